"""Broken messages to a running server, and a good client beside them that must keep its frames.

Called by `serving.fuzz`. Conversation `n` says the messages from `n * NUM_WORDS` on, so that it can be held again. Its
last word must be a typed error or the statistics, or the transport's own reason for closing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from cluster import memory
from serving import protocol
from serving.abuse import CLOSE_S, a_hello, server_rss_mb
from serving.client import Client
from serving.fuzz.mutations import CODECS, SEQ_STEP, SIDE_PX, Fuzzed, fuzzed, good_frame
from serving.fuzz.parsers import CLIENT_CODES, MAX_FAILURES, WARM_UP, Failure, growth
from serving.protocol import Mode
from serving.tasks import all_of, first_to_end
from stages.errors import UserError
from stages.portraits import bundled_portraits

NUM_WORDS = 12
"""Messages in the longest conversations: more than a live session survives, if it refuses them all."""
MIN_WORDS = 4
GOOD_SHARE, NUM_GOOD = 0.4, 3
"""Before so many of the messages, so many good frames keep the session at work."""
NUM_AT_ONCE = 4
HELLO_SHARE, READY_SHARE, LOSSLESS_SHARE = 0.85, 0.9, 0.15
"""Conversations that begin with a valid hello; those of them that wait for ready; those that are lossless."""
WORD_S = 0.02
"""The next message waits so long for an answer to the last one; many have none."""
ANSWER_S = 60.0
"""For a whole conversation."""
TRANSPORT_CODES = frozenset({1003, 1007, 1009})
"""Closings by the transport that say why: not this kind of data, no UTF-8, too large."""
GOOD_FPS = 10
MAX_GAP_S = 10.0
"""Between two frames of the good client."""


@dataclass
class Heard:
    """What a server said in all conversations."""

    counts: Counter[str] = field(default_factory=Counter)
    """Codes of errors, other answers by their type, and closings by the transport."""
    num_sent: int = 0
    good_s: list[float] = field(default_factory=list)
    """When the good client got its frames."""
    failures: list[Failure] = field(default_factory=list)


async def run_live(url: str, num_messages: int, seed: int) -> tuple[dict[str, Any], list[Failure]]:
    """So many messages to a server. Returns the figures, and what failed.

    Raises UserError when the good client is not taken in the first place.
    """
    heard, rss_mb = Heard(), dict[str, float]()
    started_s = time.monotonic()
    async with Client(url, portrait=next(iter(bundled_portraits())), reconnect_s=0.0) as good:
        try:
            await first_to_end(_send(good), _watch(good, heard), _converse_all(url, num_messages, seed, heard, rss_mb))
        except UserError as error:
            heard.failures.append(Failure(f"the good client was told {error.code}: {error}"))
    gap_s = _longest_gap_s([*heard.good_s, time.monotonic()])
    if gap_s is None or gap_s > MAX_GAP_S:
        heard.failures.append(Failure(f"the good client had no frame for {gap_s} s"))
    if "end" in rss_mb:
        heard.failures += growth(rss_mb, num_messages)
    figures = {
        "messages": heard.num_sent,
        "seconds": round(time.monotonic() - started_s, 1),
        "good_frames": len(heard.good_s),
        "good_longest_gap_s": gap_s,
        "server_rss_mb": rss_mb,
        "counts": dict(heard.counts.most_common()),
        "failures": [failure.as_dict() for failure in heard.failures],
    }
    return figures, heard.failures


async def _converse_all(url: str, num_messages: int, seed: int, heard: Heard, rss_mb: dict[str, float]) -> None:
    numbers = itertools.count()

    async def one_after_another(num_sent: int) -> None:
        while heard.num_sent < num_sent and len(heard.failures) < MAX_FAILURES:
            await converse(url, seed, next(numbers), heard)

    for name, share in (("early", WARM_UP), ("end", 1.0)):
        await asyncio.gather(*(one_after_another(int(share * num_messages)) for _ in range(NUM_AT_ONCE)))
        await asyncio.sleep(2 * memory.DELAY_S)
        rss_mb[name] = server_rss_mb()


async def _send(good: Client) -> None:
    for number in itertools.count():
        await good.send(np.full((SIDE_PX, SIDE_PX, 3), number % 256, np.uint8))
        await asyncio.sleep(1 / GOOD_FPS)


async def _watch(good: Client, heard: Heard) -> None:
    async for _ in good:
        heard.good_s.append(time.monotonic())
    raise UserError("the session was ended", "ended")


def _longest_gap_s(times_s: list[float]) -> float | None:
    """Between two of the times; None where there are no two."""
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    return round(max(gaps_s), 2) if gaps_s else None


async def converse(url: str, seed: int, number: int, heard: Heard) -> None:
    """One connection: mostly a valid hello, then broken messages among good ones until it is closed, and a farewell."""
    rng = random.Random(f"{seed}:{number}")
    first = number * NUM_WORDS
    messages = [fuzzed(seed, first + word) for word in range(rng.randint(MIN_WORDS, NUM_WORDS))]
    about = messages[0]
    try:
        async with (
            asyncio.timeout(ANSWER_S),
            connect(url, max_size=None, compression=None, open_timeout=ANSWER_S, close_timeout=CLOSE_S) as socket,
        ):
            conversation = Conversation(socket, heard, rng, about)
            try:
                await all_of(conversation.listen(), conversation.talk(messages))
            finally:
                about = conversation.last_said
    except (OSError, TimeoutError, WebSocketException, UserError) as error:
        what = "no end came" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
        heard.failures.append(Failure(f"conversation {number}: {what}", about))


class Conversation:
    """Both sides of one connection."""

    def __init__(self, socket: ClientConnection, heard: Heard, rng: random.Random, first: Fuzzed):
        self.last_said = first
        self._socket, self._heard, self._rng = socket, heard, rng
        self._codec = rng.choice(CODECS)
        self._mode: Mode = "lossless" if rng.random() < LOSSLESS_SHARE else "live"
        self._num_outputs = 0
        self._is_over = False
        self._ready, self._answered = asyncio.Event(), asyncio.Event()

    async def talk(self, messages: list[Fuzzed]) -> None:
        """Says all of it, as far as the server listens."""
        with contextlib.suppress(ConnectionClosed):
            says_hello = self._rng.random() < HELLO_SHARE
            if says_hello:
                await self._say_hello()
            for message in messages:
                if says_hello and self._rng.random() < GOOD_SHARE:
                    await self._say_well(message.number)
                if self._is_over:
                    return
                # The first word always has an answer.
                is_first = message is messages[0] and not says_hello
                await self._say(message, ANSWER_S if is_first else WORD_S)
            await self._socket.send(protocol.pack(self._rng.choice((protocol.Bye(), protocol.End()))))
            if not self._ready.is_set():
                await self._socket.send(protocol.pack(protocol.Bye()))

    async def _say_hello(self) -> None:
        await self._socket.send(a_hello(mode=self._mode, codec=self._codec))
        if self._rng.random() < READY_SHARE:
            await self._ready.wait()
            await self._say_well(self.last_said.number)

    async def _say_well(self, number: int) -> None:
        # More of them would need credit in a lossless session.
        if self._mode == "live" or self._num_outputs == 0:
            for step in range(NUM_GOOD):
                await self._socket.send(good_frame(number * SEQ_STEP + step, self._codec))

    async def _say(self, message: Fuzzed, wait_s: float) -> None:
        self.last_said = message
        self._heard.num_sent += 1
        self._answered.clear()
        await self._socket.send(message.data, text=message.is_text)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._answered.wait(), wait_s)

    async def listen(self) -> None:
        """Takes every answer until the socket is closed. Raises UserError for one that must not be."""
        last: protocol.ServerMessage | None = None
        try:
            while True:
                last, _ = protocol.parse_server(await self._socket.recv())
                self._note(last)
                if isinstance(last, protocol.OutputFrame):
                    # A server that has closed meanwhile may have said why: that still lies unread.
                    with contextlib.suppress(ConnectionClosed):
                        await self._socket.send(protocol.pack(protocol.Shown(self._num_outputs)))
        except ConnectionClosed as closed:
            self._note_end(last, closed)
        finally:
            self._is_over = True
            self._ready.set()
            self._answered.set()

    def _note(self, answer: protocol.ServerMessage) -> None:
        self._heard.counts[answer.code if isinstance(answer, protocol.Error) else answer.type] += 1
        match answer:
            case protocol.Error() if answer.code not in CLIENT_CODES:
                raise UserError(f"the server said {answer.code}: {answer.message}")
            case protocol.Ready():
                self._ready.set()
            case protocol.OutputFrame():
                self._num_outputs += 1
        self._answered.set()

    def _note_end(self, last: protocol.ServerMessage | None, closed: ConnectionClosed) -> None:
        if isinstance(last, protocol.Ended) or (isinstance(last, protocol.Error) and last.fatal):
            return
        code = closed.rcvd.code if closed.rcvd else None
        self._heard.counts[f"closed {code}"] += 1
        if code not in TRANSPORT_CODES:
            raise UserError(f"the socket was closed without a reason (code {code})")
