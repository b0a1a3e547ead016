"""Bad clients of ten kinds at once, for a given time, to show that the good ones beside them do not notice.

`python -m serving.fuzz.bad_clients --url U --seconds S [--num 10] [--json]`, which `serving.bench` starts as a process
of its own. Each comes again when it was closed, at a bounded rate. They take little of the processor themselves:
messages are made beforehand, and the command runs at a low priority. No Ray, no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import WebSocketException

from serving import protocol
from serving.abuse import (
    Abuse,
    a_frame,
    check_is_local,
    flood,
    huge_picture,
    open_session,
    send_huge_pictures,
    told,
    vanish_with_hello,
)
from serving.client import URL
from serving.fuzz.mutations import Fuzzed, fuzzed
from stages.errors import UserError

HOLD_S = 35.0
"""Who only holds a connection goes by itself after so long: a little longer than the server's own bounds."""
CAMERA_FPS = 10
READ_EVERY_S = 1.0
NUM_GARBAGE, MAX_GARBAGE_BYTES = 300, 64 * 2**10
GARBAGE_PER_S, GARBAGE_PER_VISIT = 20, 30
STORM_PER_S = 20
PAUSE_S = 1.0
"""Between two visits of all others."""
NICENESS = 10

Visit = Callable[[str], Coroutine[Any, Any, str | None]]
"""One connection to a server; returns the code of the fatal error that it was told, if any."""


async def say_nothing(socket: ClientConnection) -> None:
    """Connects and never says hello."""


async def hold_place(socket: ClientConnection) -> None:
    """Has a session and sends no frames."""
    await open_session(socket)


async def read_slowly(socket: ClientConnection) -> None:
    """Sends a camera's frames, reads one message a second, and reports nothing shown."""
    await _film(socket, READ_EVERY_S)


async def never_read(socket: ClientConnection) -> None:
    """Sends a camera's frames and reads nothing."""
    await _film(socket, None)


async def _film(socket: ClientConnection, read_every_s: float | None) -> None:
    await open_session(socket)
    for seq in range(int(HOLD_S * CAMERA_FPS)):
        await socket.send(a_frame(seq))
        await asyncio.sleep(1 / CAMERA_FPS)
        if read_every_s is not None and seq % round(read_every_s * CAMERA_FPS) == 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(socket.recv(), 1 / CAMERA_FPS)
    socket.transport.abort()


async def stop_answering(socket: ClientConnection) -> None:
    """Says hello and is then as a machine without power: nothing is read or answered, and nothing closed."""
    await open_session(socket)
    socket.transport.pause_reading()
    await asyncio.sleep(HOLD_S)
    socket.transport.abort()


async def talk_garbage(socket: ClientConnection) -> None:
    """Broken messages in a session, then bye."""
    await open_session(socket)
    for message in random.sample(garbage(), GARBAGE_PER_VISIT):
        await socket.send(message.data, text=message.is_text)
        await asyncio.sleep(1 / GARBAGE_PER_S)
    await socket.send(protocol.pack(protocol.Bye()))


@functools.cache
def garbage() -> list[Fuzzed]:
    """Broken messages, none of them so large that a few are a flood."""
    messages = (fuzzed(0, number) for number in itertools.count())
    return list(itertools.islice((one for one in messages if len(one.data) <= MAX_GARBAGE_BYTES), NUM_GARBAGE))


def prepare() -> None:
    """Makes what is sent, so that it costs nothing later. Takes a second."""
    garbage(), huge_picture()


async def half_handshake(url: str) -> None:
    """Begins to ask for a websocket and does not come to an end."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
    try:
        writer.write(f"GET {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\n".encode())
        async with asyncio.timeout(HOLD_S):
            await reader.read()
    finally:
        writer.transport.abort()


def _visit(abuse: Abuse) -> Visit:
    return functools.partial(told, abuse=abuse)


KINDS: dict[str, tuple[Visit, float]] = {
    "silent": (_visit(say_nothing), PAUSE_S),
    "flood": (_visit(flood), PAUSE_S),
    "slow_reader": (_visit(read_slowly), PAUSE_S),
    "reconnect_storm": (_visit(vanish_with_hello), 1 / STORM_PER_S),
    "garbage": (_visit(talk_garbage), PAUSE_S),
    "half_open": (_visit(stop_answering), PAUSE_S),
    "half_handshake": (half_handshake, PAUSE_S),
    "huge_pictures": (_visit(send_huge_pictures), PAUSE_S),
    "idle_place": (_visit(hold_place), PAUSE_S),
    "never_reads": (_visit(never_read), PAUSE_S),
}
"""What bad clients do, and the pause before each does it again."""


async def run_bad_clients(url: str, seconds: float, num: int = 10, allow_remote: bool = False) -> dict[str, int]:
    """Plays `num` bad clients at once, of all kinds in turn, for so many seconds.

    Returns for each kind its `<kind> attempts`, and `<kind> <answer>`: the code of the fatal error that it was told,
    `left` where it went or was closed without one, `held` where nothing came before it gave up or the time was over,
    `unreachable` where it was not let in. Raises UserError for a server that is not on this machine.
    """
    check_is_local(url, allow_remote)
    await asyncio.to_thread(prepare)
    counts = Counter[str]()
    until_s = asyncio.get_running_loop().time() + seconds
    kinds = itertools.islice(itertools.cycle(KINDS), num)
    await asyncio.gather(*(_again_and_again(url, kind, until_s, counts) for kind in kinds))
    return dict(sorted(counts.items()))


async def _again_and_again(url: str, kind: str, until_s: float, counts: Counter[str]) -> None:
    visit, pause_s = KINDS[kind]
    clock_s = asyncio.get_running_loop().time
    while clock_s() < until_s:
        counts[f"{kind} attempts"] += 1
        counts[f"{kind} {await _answer(visit, url, until_s)}"] += 1
        await asyncio.sleep(max(0.0, min(pause_s, until_s - clock_s())))


async def _answer(visit: Visit, url: str, until_s: float) -> str:
    try:
        async with asyncio.timeout_at(until_s):
            return await visit(url) or "left"
    except TimeoutError:
        return "held"
    except (OSError, WebSocketException):
        return "unreachable"


def main() -> int:
    """Runs the command; returns 2 when it may not begin."""
    parser = argparse.ArgumentParser(prog="python -m serving.fuzz.bad_clients", description="Bad clients, all at once.")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--num", type=int, default=len(KINDS))
    parser.add_argument("--allow-remote", action="store_true", help="the server at --url is mine, though elsewhere")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.nice(NICENESS)
    try:
        counts = asyncio.run(run_bad_clients(args.url, args.seconds, args.num, args.allow_remote))
    except UserError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(counts, indent=2) if args.json else "\n".join(f"{name}: {num}" for name, num in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
