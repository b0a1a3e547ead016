import pytest

from serving.delays import MAX_SAMPLES, WINDOW_S, DelayWindow


def filled(times_s, delay_ms=lambda number: 100.0):
    window = DelayWindow()
    for number, time_s in enumerate(times_s):
        window.add(time_s, delay_ms(number))
    return window


def test_a_new_window_knows_nothing():
    assert DelayWindow().fps(5.0) == 0.0
    assert DelayWindow().delay_ms(5.0) == {"p50": None, "p95": None}


@pytest.mark.parametrize("seconds", [2, 10, 60])
def test_the_rate_is_that_of_the_time_since_the_first_frame_or_of_the_last_ten_seconds(seconds):
    window = filled([number / 20 for number in range(seconds * 20)])
    assert window.fps(float(seconds)) == pytest.approx(20, abs=0.2)


def test_the_first_frames_do_not_make_a_rate_of_thousands():
    assert filled([0.0, 0.001, 0.002]).fps(0.003) == 3.0


def test_the_rate_falls_to_nothing_when_nothing_more_is_shown():
    window = filled([number / 10 for number in range(100)])
    assert window.fps(10.0) == pytest.approx(10.0, abs=0.2)
    assert window.fps(15.0) == pytest.approx(5.0, abs=0.2)
    assert window.fps(30.0) == 0.0
    assert window.delay_ms(30.0) == {"p50": None, "p95": None}


def test_after_a_pause_the_rate_is_again_over_ten_seconds():
    window = filled([0.0, *(100 + number / 10 for number in range(50))])
    assert window.fps(105.0) == pytest.approx(5.0, abs=0.1)


def test_percentiles_are_of_the_last_ten_seconds_alone():
    window = filled(range(101), delay_ms=lambda number: float(number))
    assert window.delay_ms(100.0) == {"p50": 95.0, "p95": 100.0}


def test_percentiles_are_values_that_so_many_do_not_exceed():
    window = filled([number / 10 for number in range(100)], delay_ms=lambda number: float(number + 1))
    assert window.delay_ms(9.9) == {"p50": 50.0, "p95": 95.0}


def test_frames_without_a_driving_frame_count_for_the_rate_alone():
    window = filled([0.0, 1.0, 2.0, 3.0], delay_ms=lambda number: 250.0 if number == 3 else None)
    assert window.fps(4.0) == 1.0
    assert window.delay_ms(4.0) == {"p50": 250.0, "p95": 250.0}


def test_a_client_that_reports_too_much_costs_no_more_memory_and_keeps_its_rate():
    window = filled([number / 1000 for number in range(20_000)])
    assert len(window._samples) == MAX_SAMPLES < WINDOW_S * 1000
    assert window.fps(20.0) == pytest.approx(1000, rel=0.05)
