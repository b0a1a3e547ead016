"""What a replica says of itself, over the routes of a real server."""

import asyncio
import json
import os
import urllib.request

import numpy as np

from serving.client import Client


def picture(number):
    return np.full((64, 64, 3), number % 200 + 1, np.uint8)


async def get(server, path):
    url = server.url.replace("ws:", "http:").replace("/v1/stream", path)
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())


async def test_the_status_names_sessions_counts_and_memory(echo_server, portrait):
    server = await echo_server()
    async with Client(server.url, portrait=portrait, mode="lossless", codec="raw") as client:
        for number in range(6):
            await client.send(picture(number))
        await client.end()
        outputs = [output async for output in client]
    async with Client(server.url, portrait=portrait):
        status = json.loads(await get(server, "/v1/status"))
        assert status["ready"]
        [replica] = status["replicas"]
        assert (replica["id"], replica["pid"], replica["num_sessions"]) == ("echo", os.getpid(), 1)
        assert replica["rss_mb"] > 10
        [session] = replica["sessions"]
        assert (session["state"], session["fps"], session["num_recoveries"]) == ("live", 0.0, 0)
        counts = replica["counts"]
        assert (counts["admitted"], counts["frames_in"], counts["frames_out"]) == (2, 6, len(outputs))


async def test_a_replica_that_is_being_replaced_tells_its_live_clients(echo_server, portrait):
    server = await echo_server()
    async with Client(server.url, portrait=portrait, mode="lossless") as lossless:
        async with Client(server.url, portrait=portrait, reconnect_s=0) as live:
            await server.replica.announce_draining()
            async with asyncio.timeout(3):
                while not live.complaints:
                    await asyncio.sleep(0.01)
            assert [one.code for one in live.complaints] == ["draining"]
        assert lossless.complaints == []


async def test_the_status_page_is_there(echo_server):
    server = await echo_server()
    assert b"<html" in await get(server, "/status")
