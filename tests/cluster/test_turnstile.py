import asyncio
import itertools
import time

import pytest

from cluster import turnstile as turnstiles
from cluster.turnstile import Turnstile


async def test_one_at_a_time_and_only_for_a_share_of_the_time() -> None:
    turnstile = Turnstile(share=0.25)
    spans: list[tuple[float, float]] = []

    async def work() -> None:
        await turnstile.enter()
        started_s = time.monotonic()
        await asyncio.sleep(0.03)
        spans.append((started_s, time.monotonic()))
        turnstile.leave()

    await asyncio.gather(*(work() for _ in range(4)))
    for (start_s, end_s), (next_start_s, _) in itertools.pairwise(spans):
        assert next_start_s - end_s >= 2.9 * (end_s - start_s)


async def test_the_first_one_waits_for_nothing() -> None:
    turnstile = Turnstile(share=0.01)
    await asyncio.wait_for(turnstile.enter(), 0.05)


async def test_who_stops_waiting_takes_no_turn() -> None:
    turnstile = Turnstile(share=0.5)
    await turnstile.enter()
    leaving = [asyncio.create_task(turnstile.enter()) for _ in range(5)]
    staying = asyncio.create_task(turnstile.enter())
    await asyncio.sleep(0.01)
    for task in leaving:
        task.cancel()
    turnstile.leave()
    await asyncio.wait_for(staying, 0.5)
    with pytest.raises(asyncio.CancelledError):
        await leaving[0]


async def test_a_turn_ends_also_when_it_fails() -> None:
    turnstile = Turnstile(share=0.5)
    with pytest.raises(ZeroDivisionError):
        async with turnstile.turn():
            raise ZeroDivisionError
    async with asyncio.timeout(0.5), turnstile.turn():
        pass


async def test_a_pause_is_never_longer_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstiles, "MAX_PAUSE_S", 0.1)
    turnstile = Turnstile(share=0.001)
    async with turnstile.turn():
        await asyncio.sleep(0.05)
    await asyncio.wait_for(turnstile.enter(), 1.0)
