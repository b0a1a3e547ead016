import pytest

from serving.report import Receipt, as_text, mean_stage_ms, per_10_s, percentiles, rate


def test_percentiles_of_nothing_are_null():
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}
    assert percentiles([10.0] * 99 + [1000.0])["p50"] == 10.0


def test_the_rate_counts_intervals_not_frames():
    assert rate([Receipt(k / 10, 5.0) for k in range(21)]) == pytest.approx(10.0)
    assert rate([Receipt(1.0, 5.0)]) == 0.0


def test_bins_of_ten_seconds_tell_rates_and_delays_apart():
    receipts = [Receipt(k / 10, 100.0) for k in range(100)] + [Receipt(10 + k / 5, 300.0) for k in range(26)]
    first, second = per_10_s(receipts)
    assert first == {"t_s": 0.0, "fps": 10.0, "delay_ms": {"p50": 100.0, "p95": 100.0, "p99": 100.0}}
    assert (second["t_s"], second["fps"], second["delay_ms"]["p95"]) == (10.0, 5.0, 300.0)


def test_stage_times_are_averaged_by_name():
    assert mean_stage_ms([{"motion": 1.0}, {"motion": 3.0, "decode": 4.0}]) == {"decode": 4.0, "motion": 2.0}


def test_the_text_has_every_figure():
    report = {
        "fps": 12.5,
        "frames_sent": 30,
        "frames_dropped": 2,
        "frames_received": 28,
        "delay_ms": percentiles([100.0]),
        "per_10_s": per_10_s([Receipt(0.5, 100.0)]),
        "stage_ms": {"motion": 3.0},
        "frames_sha256": "abc",
    }
    text = as_text(report)
    for part in ("30 sent", "2 dropped", "28 received", "12.5", "p95 100", "motion 3", "abc"):
        assert part in text
