import asyncio
import time

import pytest

from cluster.threads import StageThread, learn


async def test_a_thread_knows_how_long_calls_take_and_how_much_it_has_worked() -> None:
    thread = StageThread("stage")
    assert (await thread.call(2, lambda: time.sleep(0.03)))[1] >= 30
    assert await thread.run(lambda: 5) == 5
    assert list(thread.call_ms) == [2] and thread.call_ms[2] >= 30
    assert 0.03 <= thread.busy_s < 1


async def test_the_first_call_of_a_size_counts_only_until_there_is_another() -> None:
    thread = StageThread("stage")
    for seconds, at_most_ms in ((0.2, 1000), (0.01, 150), (0.2, 150)):
        await thread.call(1, time.sleep, seconds)
        assert thread.call_ms[1] < at_most_ms
    assert thread.call_ms[1] > 15


async def test_a_thread_knows_that_it_is_stuck() -> None:
    thread = StageThread("stage")
    assert thread.stuck_s == 0
    working = asyncio.create_task(thread.run(time.sleep, 0.1))
    await asyncio.sleep(0.06)
    assert 0.03 < thread.stuck_s < 1
    await working
    assert thread.stuck_s == 0


async def test_an_error_comes_out_and_counts_as_no_call() -> None:
    thread = StageThread("stage")
    with pytest.raises(ZeroDivisionError):
        await thread.call(1, lambda: 1 // 0)
    assert thread.call_ms == {} and thread.stuck_s == 0


def test_slowness_is_learned_sooner_than_it_is_forgotten() -> None:
    ms = learn(None, 100.0)
    for _ in range(30):
        ms = learn(ms, 200.0)
    assert ms > 190
    for _ in range(30):
        ms = learn(ms, 100.0)
    assert 130 < ms < 150
