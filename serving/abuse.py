"""Bad clients of every kind, to show that each gets its typed error and that nothing is left of it in the server.

`python -m serving.abuse [--url U] [--sessions 200]` plays them one after another against a running server, prints who
was told something wrong, and the memory of the server's processes after 20 sessions and at the end, where they run on
this machine. Used by tests/system/test_serving.py. No Ray, no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import ipaddress
import itertools
import json
import struct
import sys
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from serving import protocol
from serving.client import URL, ServerError
from serving.codec import encode
from stages.errors import UserError
from stages.portraits import bundled_portraits, read_bundled_portrait

ANSWER_S = 60.0
CLOSE_S = 1.0
"""A bad client waits no longer for a farewell that it may not be reading."""
NUM_WARM_UP = 20
"""Memory is compared with that after so many sessions: by then every code path has been walked once."""
SERVER_TITLES = ("ray::ServeReplica", "ray::Member", "ray::PoolManager")

Abuse = Callable[[ClientConnection], Coroutine[Any, Any, None]]


def check_is_local(url: str, allow_remote: bool) -> None:
    """Raises UserError where the address is not this machine's: what is here is for servers of one's own."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        if allow_remote or host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return
    raise UserError(f"{host or url} is not this machine: if the server there is yours, say --allow-remote")


def picture_file(width: int, height: int) -> bytes:
    """A PNG of this size, however large, in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def huge_picture() -> bytes:
    """The largest WebP that is taken, in a few kilobytes."""
    return encode(np.full((2048, 2048, 3), 128, np.uint8), "webp", 10)


def a_frame(seq: int, side: int = 64, payload: bytes | None = None) -> str | bytes:
    """A driving frame as JPEG."""
    jpeg = encode(np.full((side, side, 3), 128, np.uint8), "jpeg") if payload is None else payload
    return protocol.pack(protocol.DrivingFrame(seq, float(seq)), jpeg)


def a_hello(
    portrait: bytes | None = None, mode: protocol.Mode = "live", codec: protocol.CodecName = "jpeg"
) -> str | bytes:
    """A hello, with a bundled portrait unless another is given."""
    data = read_bundled_portrait(next(iter(bundled_portraits()))) if portrait is None else portrait
    return protocol.pack(protocol.Hello(protocol.PROTOCOL, mode=mode, codec=codec), data)


async def open_session(
    socket: ClientConnection, mode: protocol.Mode = "live", codec: protocol.CodecName = "jpeg"
) -> None:
    """Says hello and waits for ready. Raises ServerError when the server ends the session instead."""
    await socket.send(a_hello(mode=mode, codec=codec))
    while not isinstance(message := protocol.parse_server(await socket.recv())[0], protocol.Ready):
        if isinstance(message, protocol.Error) and message.fatal:
            raise ServerError(message.message, message.code)


def first_word(data: str | bytes) -> Abuse:
    """A client that says one wrong thing instead of hello."""

    async def abuse(socket: ClientConnection) -> None:
        await socket.send(data)

    return abuse


def again_and_again(make: Callable[[int], str | bytes]) -> Abuse:
    """A client that says a wrong thing once more than a live session survives."""

    async def abuse(socket: ClientConnection) -> None:
        await open_session(socket)
        await socket.send(a_frame(5))
        for number in range(protocol.MAX_NUM_REFUSED + 1):
            await socket.send(make(number))

    return abuse


async def vanish_with_hello(socket: ClientConnection) -> None:
    await socket.send(a_hello())
    socket.transport.abort()


async def vanish(socket: ClientConnection) -> None:
    await open_session(socket)
    for seq in range(30):
        await socket.send(a_frame(seq))
    socket.transport.abort()


async def stop_reading(socket: ClientConnection) -> None:
    """Sends a camera's frames, never reports one shown, and goes after a while."""
    await open_session(socket)
    for seq in range(50):
        await socket.send(a_frame(seq))
        await asyncio.sleep(1 / 50)
    socket.transport.abort()


async def send_huge_pictures(socket: ClientConnection) -> None:
    """The largest pictures that are taken, in a few kilobytes each, as fast as they are no flood; then leaves."""
    await open_session(socket, codec="webp")
    for seq in range(200):
        await socket.send(a_frame(seq, payload=huge_picture()))
        await asyncio.sleep(1 / 200)
    await socket.send(protocol.pack(protocol.Bye()))


async def flood(socket: ClientConnection) -> None:
    await open_session(socket)
    message = protocol.pack(protocol.Ping(0.0), bytes(2 * 2**20))
    for _ in range(500):
        await socket.send(message)


async def send_without_credit(socket: ClientConnection) -> None:
    await open_session(socket, "lossless")
    for seq in range(100):
        await socket.send(a_frame(seq))


ABUSES: dict[str, tuple[Abuse, str | None]] = {
    "not an image": (first_word(a_hello(b"this is no picture" * 100)), "bad_portrait"),
    "1x1 portrait": (first_word(a_hello(picture_file(1, 1))), "bad_portrait"),
    "10,000x10,000 portrait": (first_word(a_hello(picture_file(10_000, 10_000))), "bad_portrait"),
    "wrong version": (first_word('{"type": "hello", "protocol": 99}'), "bad_version"),
    "frame before hello": (first_word(a_frame(0)), "not_hello"),
    "binary garbage": (first_word(np.random.default_rng(0).bytes(5000)), "bad_header"),
    "message over the cap": (first_word(bytes(protocol.MAX_MESSAGE_BYTES + 1)), "too_large"),
    "sequence backwards": (again_and_again(lambda number: a_frame(4)), "seq_backwards"),
    "another size": (again_and_again(lambda number: a_frame(6 + number, side=80)), "frame_size_changed"),
    "frames that are no pictures": (again_and_again(lambda number: a_frame(6 + number, payload=b"no")), "bad_frame"),
    "garbage in the stream": (again_and_again(lambda number: struct.pack(">I", number)), "bad_header"),
    "vanishes with its hello": (vanish_with_hello, None),
    "vanishes": (vanish, None),
    "sends huge pictures": (send_huge_pictures, None),
    "stops reading": (stop_reading, None),
    "floods": (flood, "flooding"),
    "sends without credit": (send_without_credit, "no_credit"),
}
"""What bad clients do, and the code that each must be told; None: it leaves before it could be told."""


async def told(url: str, abuse: Abuse) -> str | None:
    """Plays one bad client; returns the code of the server's fatal error, if it came."""
    async with connect(url, max_size=None, compression=None, open_timeout=ANSWER_S, close_timeout=CLOSE_S) as socket:
        abusing = asyncio.create_task(abuse(socket))
        try:
            async with asyncio.timeout(ANSWER_S):
                await asyncio.wait([abusing])
                if isinstance(refusal := abusing.exception(), ServerError):
                    return refusal.code
                return await _fatal_code(socket)
        finally:
            abusing.cancel()
            await asyncio.gather(abusing, return_exceptions=True)


async def _fatal_code(socket: ClientConnection) -> str | None:
    try:
        while True:
            message, _ = protocol.parse_server(await socket.recv())
            if isinstance(message, protocol.Error) and message.fatal:
                return message.code
    except ConnectionClosed:
        return None


def server_rss_mb(root_pid: int | None = None) -> float:
    """Memory of all ingress replicas, members and managers under a process (default: on this machine)."""
    processes = psutil.process_iter() if root_pid is None else psutil.Process(root_pid).children(recursive=True)
    total = 0
    for process in processes:
        try:
            if any(part.startswith(SERVER_TITLES) for part in process.cmdline()[:1]):
                total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return round(total / 2**20, 1)


async def abuse_server(url: str, num_sessions: int, root_pid: int | None = None) -> dict[str, Any]:
    """Plays `num_sessions` bad clients in turn. Returns what they were told, and the memory early and late."""
    wrong: list[str] = []
    rss_mb = {}
    for number, (name, (abuse, code)) in enumerate(itertools.islice(itertools.cycle(ABUSES.items()), num_sessions)):
        answer = await told(url, abuse)
        if answer != code:
            wrong.append(f"{name}: told {answer}, expected {code}")
        if number + 1 in (NUM_WARM_UP, num_sessions):
            await asyncio.sleep(2.0)
            rss_mb[number + 1] = server_rss_mb(root_pid)
    return {"sessions": num_sessions, "wrong": wrong, "server_rss_mb": rss_mb}


def main() -> int:
    """Runs the command; returns 1 when a client was told something else than it should."""
    parser = argparse.ArgumentParser(prog="python -m serving.abuse", description="Plays bad clients against a server.")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--sessions", type=int, default=200)
    args = parser.parse_args()
    figures = asyncio.run(abuse_server(args.url, args.sessions))
    print(json.dumps(figures, indent=2))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
