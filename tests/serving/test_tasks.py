import asyncio

import pytest

from serving.tasks import all_of, first_to_end


async def forever(seen):
    try:
        await asyncio.Event().wait()
    finally:
        seen.append("cancelled")


async def returns():
    await asyncio.sleep(0)


async def fails():
    await asyncio.sleep(0)
    raise ValueError("mine")


async def test_the_first_to_end_ends_the_others():
    seen = []
    await first_to_end(forever(seen), returns())
    assert seen == ["cancelled"]


@pytest.mark.parametrize("run", [all_of, first_to_end])
async def test_an_error_ends_the_others_and_comes_out_as_itself(run):
    seen = []
    with pytest.raises(ValueError, match="mine"):
        await run(forever(seen), fails())
    assert seen == ["cancelled"]


@pytest.mark.parametrize("run", [all_of, first_to_end])
async def test_cancelling_the_whole_cancels_every_part(run):
    seen = []
    whole = asyncio.create_task(run(forever(seen), forever(seen)))
    await asyncio.sleep(0.01)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert seen == ["cancelled"] * 2


async def test_all_wait_for_all():
    await all_of(returns(), returns())
