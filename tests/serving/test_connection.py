from serving.connection import BUDGET_S, Budget
from serving.protocol import MAX_MESSAGE_BYTES


def test_a_burst_is_allowed_and_a_flood_is_not():
    budget = Budget(100_000_000)
    assert budget.spend(int(BUDGET_S * 100_000_000), now_s=0.0)
    assert not budget.spend(1, now_s=0.0)
    assert budget.spend(5_000_000, now_s=0.06)


def test_a_stream_below_the_limit_goes_on_for_ever():
    budget = Budget(1_000_000)
    assert all(budget.spend(39_000, now_s=k / 25) for k in range(5000))


def test_a_stream_above_the_limit_ends_soon():
    budget = Budget(10_000_000)
    assert not all(budget.spend(800_000, now_s=k / 25) for k in range(100))


def test_one_whole_message_fits_however_small_the_rate():
    assert Budget(1000).spend(MAX_MESSAGE_BYTES, now_s=0.0)
