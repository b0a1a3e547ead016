import pytest

from cluster.batching import MAX_PENDING, Pending, Progress, bucket, check_number, next_batch
from cluster.errors import StaleChunk, TooManyChunks

ANNA, BEN, CLEO, DAN = ("anna", 0), ("ben", 0), ("cleo", 2), ("dan", 0)


def test_the_earliest_chunk_of_each_session_goes_first() -> None:
    pending = [Pending(ANNA, 4, 3.0), Pending(BEN, 0, 1.0), Pending(CLEO, 7, 2.0)]
    progress = {ANNA: Progress(4), BEN: Progress(0), CLEO: Progress(7)}
    assert [chunk.session for chunk in next_batch(pending, progress, max_batch=8)] == [BEN, CLEO]
    progress[DAN] = Progress(2)
    pending.append(Pending(DAN, 2, 0.5))
    assert [chunk.session for chunk in next_batch(pending, progress, max_batch=8)] == [DAN, BEN, CLEO, ANNA]


def test_a_session_takes_part_once_per_call_in_the_order_of_its_numbers() -> None:
    pending = [Pending(ANNA, 2, 1.0), Pending(ANNA, 1, 2.0), Pending(BEN, 0, 3.0)]
    batch = next_batch(pending, {ANNA: Progress(1), BEN: Progress(0)}, max_batch=4)
    assert [(chunk.session, chunk.number) for chunk in batch] == [(ANNA, 1), (BEN, 0)]


def test_an_early_chunk_waits_for_the_one_before_it() -> None:
    assert next_batch([Pending(ANNA, 3, 0.0)], {ANNA: Progress(2)}, max_batch=4) == ()


def test_a_session_that_waits_for_its_keyframe_sits_out_and_others_go_on() -> None:
    pending = [Pending(ANNA, 1, 0.0), Pending(BEN, 1, 1.0)]
    progress = {ANNA: Progress(1, awaits_keyframe=True), BEN: Progress(1)}
    assert [chunk.session for chunk in next_batch(pending, progress, max_batch=4)] == [BEN]


def test_no_more_than_max_batch_go_at_once() -> None:
    pending = [Pending(key, 0, due_s) for due_s, key in enumerate([CLEO, ANNA, BEN])]
    progress = {key: Progress(0) for key in (ANNA, BEN, CLEO)}
    assert [chunk.session for chunk in next_batch(pending, progress, max_batch=2)] == [CLEO, ANNA]


@pytest.mark.parametrize(("number", "waiting"), [(4, []), (0, []), (6, [6])])
def test_stale_and_repeated_numbers_are_refused(number: int, waiting: list[int]) -> None:
    with pytest.raises(StaleChunk, match="next one is 5"):
        check_number(number, Progress(5), waiting)


@pytest.mark.parametrize("number", [5, 6, 99])
def test_the_next_number_and_early_ones_are_accepted(number: int) -> None:
    check_number(number, Progress(5), [7, 8])


def test_a_session_that_never_waits_for_results_is_refused() -> None:
    with pytest.raises(TooManyChunks):
        check_number(99, Progress(0), range(MAX_PENDING))


@pytest.mark.parametrize(
    ("num_ready", "max_batch", "num"), [(0, 4, 0), (1, 4, 1), (2, 4, 2), (3, 4, 2), (4, 4, 4), (9, 8, 8), (9, 6, 4)]
)
def test_calls_have_few_sizes(num_ready: int, max_batch: int, num: int) -> None:
    assert bucket(num_ready, max_batch) == num


def test_who_is_left_out_of_a_call_goes_first_in_the_next() -> None:
    due_s = {key: float(n) for n, key in enumerate((ANNA, BEN, CLEO, DAN))}
    progress = {key: Progress(0) for key in due_s}
    num_calls = dict.fromkeys(due_s, 0)
    for call in range(20):
        pending = [Pending(key, 0, due_s[key]) for key in due_s]
        for chunk in next_batch(pending, progress, max_batch=2):
            num_calls[chunk.session] += 1
            due_s[chunk.session] = 10.0 + call
    assert set(num_calls.values()) == {10}
