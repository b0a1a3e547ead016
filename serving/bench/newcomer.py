"""One more person than there are places: is told to wait, and gets a place when others leave.

Called by `serving.bench.runs`. What the others feel of it is in the figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from serving.bench.log import Log, Newcomer, Plan
from serving.bench.play import During, Film, NotOpened, Playing, play
from serving.bench.server import Server
from serving.client import Client
from serving.line import now_ms
from stages.errors import UserError
from stages.portraits import bundled_portraits

PLACE_S = 60.0
"""Within this the newcomer must have its place when all others have left."""


class NotQueued(UserError):
    """The newcomer was let in though all places were taken."""

    code = "not_queued"


async def play_with_one_more(server: Server, plan: Plan, film: Film, before: During, while_it_waits: During) -> Log:
    """Plays the plan's sessions, lets one more come between the two, and waits until it has its place.

    What the newcomer does after the others have left is no part of the run. Raises UserError.
    """
    coming: list[asyncio.Task[None]] = []

    async def during(playing: Playing) -> None:
        await before(playing)
        newcomer = playing.log.newcomer = Newcomer(now_ms())
        coming.append(asyncio.create_task(_come(server.url, newcomer)))
        await while_it_waits(playing)
        playing.log.ended_ms = now_ms()

    try:
        log = await play(server, plan, film, during)
        if log.newcomer is not None and log.newcomer.waiting is None:
            log.error = NotQueued(f"one more than {plan.num_sessions} sessions was let in: calls have become faster")
        await _wait(coming)
        return log
    finally:
        for task in coming:
            task.cancel()


async def _come(url: str, newcomer: Newcomer) -> None:
    def on_queued(position: int, estimate_s: float) -> None:
        newcomer.waiting = newcomer.waiting or (position, estimate_s)

    async with Client(url, portrait=next(iter(bundled_portraits())), on_queued=on_queued):
        newcomer.ready_ms = now_ms()


async def _wait(coming: Sequence[asyncio.Task[None]]) -> None:
    try:
        async with asyncio.timeout(PLACE_S):
            await asyncio.gather(*coming)
    except TimeoutError:
        raise NotOpened(f"who had waited in line got no place in {PLACE_S:.0f} s after all others had left") from None
