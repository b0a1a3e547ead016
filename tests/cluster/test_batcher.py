import asyncio
import time

import pytest

from cluster.batcher import Batcher
from cluster.threads import StageThread


class Stage:
    """Doubles numbers, slowly, and cannot bear a 13."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def run(self, numbers: list[int]) -> list[int]:
        self.calls.append(numbers)
        time.sleep(0.02)
        if 13 in numbers:
            raise ArithmeticError("13")
        return [2 * number for number in numbers]


async def test_what_waits_while_the_stage_works_goes_into_its_next_calls() -> None:
    stage = Stage()
    batcher = Batcher(stage.run, StageThread("stage"), max_batch=4)
    first = asyncio.create_task(batcher.submit(0.0, 1))
    await asyncio.sleep(0.005)
    rest = [asyncio.create_task(batcher.submit(float(-n), n)) for n in range(2, 9)]
    done = await asyncio.gather(first, *rest)
    assert [one.result for one in done] == [2 * n for n in range(1, 9)]
    assert stage.calls == [[1], [8, 7, 6, 5], [4, 3], [2]]
    assert done[0].wait_ms < 19 < done[1].wait_ms and done[1].work_ms >= 19


async def test_one_that_fails_alone_fails_for_its_own_session_only() -> None:
    stage = Stage()
    batcher = Batcher(stage.run, StageThread("stage"), max_batch=4)
    first = asyncio.create_task(batcher.submit(0.0, 1))
    await asyncio.sleep(0.005)
    results = await asyncio.gather(*(batcher.submit(0.0, n) for n in (3, 13, 5, 6)), return_exceptions=True)
    assert [getattr(one, "result", type(one)) for one in results] == [6, ArithmeticError, 10, 12]
    assert (await first).result == 2


async def test_one_that_nobody_waits_for_any_more_harms_nobody() -> None:
    batcher = Batcher(Stage().run, StageThread("stage"), max_batch=4)
    first, second = (asyncio.create_task(batcher.submit(0.0, n)) for n in (1, 2))
    await asyncio.sleep(0.005)
    first.cancel()
    assert (await second).result == 4
    with pytest.raises(asyncio.CancelledError):
        await first
