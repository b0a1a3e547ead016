import pytest

from serving.clock import client_time_ms, hear

OFFSET_MS = 5000.0


def ping(clock, at_ms, up_ms, down_ms, knows_way=True):
    """A ping of a client whose clock is OFFSET_MS behind, over ways of these lengths."""
    return hear(clock, at_ms - OFFSET_MS, at_ms + up_ms, up_ms + down_ms if knows_way else None)


def test_the_offset_is_right_to_half_the_difference_of_the_ways():
    clock = ping(None, 1000.0, up_ms=30.0, down_ms=10.0)
    assert clock.offset_ms == pytest.approx(OFFSET_MS + 10.0)
    assert abs(clock.offset_ms - OFFSET_MS) <= clock.error_ms == 20.0
    assert client_time_ms(clock, 7000.0) == pytest.approx(1990.0)


def test_the_quickest_ping_counts_and_a_slow_one_changes_nothing():
    clock = ping(None, 1000.0, 2.0, 2.0)
    assert ping(clock, 2000.0, 400.0, 2.0) == clock
    assert ping(clock, 3000.0, 1.0, 1.0).error_ms == 1.0


def test_an_old_estimate_gives_way_to_a_less_exact_new_one():
    clock = ping(None, 1000.0, 2.0, 2.0)
    assert ping(clock, 61_000.0, 5.0, 5.0) != clock


def test_a_ping_that_knows_no_way_is_better_than_nothing_and_worse_than_any_that_does():
    clock = ping(None, 1000.0, 30.0, 30.0, knows_way=False)
    assert clock.offset_ms == pytest.approx(OFFSET_MS + 30.0)
    better = ping(clock, 2000.0, 30.0, 30.0)
    assert better.offset_ms == pytest.approx(OFFSET_MS)
    assert ping(better, 3000.0, 1.0, 1.0, knows_way=False) == better
