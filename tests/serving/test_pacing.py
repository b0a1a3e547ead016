import numpy as np
import pytest

from serving.pacing import Pace, plan_chunk


def simulate(decoded_s, num_frames=4):
    """Send times of every chunk's frames: each when due, and after the one before."""
    pace, sent, last = Pace(), [], float("-inf")
    for now in decoded_s:
        pace, due = plan_chunk(pace, now, num_frames)
        chunk = []
        for time in due:
            last = max(last, time)
            chunk.append(last)
        sent.append(chunk)
    return pace, sent


def test_the_first_chunk_leaves_at_once_since_no_period_is_known():
    assert plan_chunk(Pace(), 5.0, 3)[1] == [5.0, 5.0, 5.0]


def test_steady_chunks_give_evenly_spaced_frames():
    pace, sent = simulate(np.arange(20) * 0.4)
    assert pace.period_s == pytest.approx(0.4)
    assert np.diff(np.concatenate(sent[3:])) == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(5))
def test_no_frame_is_held_longer_than_one_period_and_jitter_is_smoothed(seed):
    rng = np.random.default_rng(seed)
    decoded_s = np.cumsum(rng.uniform(0.25, 0.55, 200))
    pace, periods, held, last = Pace(), [], [], float("-inf")
    times = []
    for now in decoded_s:
        pace, due = plan_chunk(pace, now, 4)
        for time in due:
            last = max(last, time)
            times.append(last)
            held.append(last - now)
        periods.append(pace.period_s or 0.0)
    assert max(held) <= max(periods) + 1e-9
    assert np.diff(times).std() < np.repeat(np.diff(decoded_s) / 4, 4).std() * 1.6


def test_a_pause_of_the_camera_does_not_become_a_delay():
    pace, _ = simulate([0.0, 0.4, 0.8, 1.2])
    after, due = plan_chunk(pace, 60.0, 4)
    assert due[-1] - 60.0 < 0.5
    assert after.period_s == pytest.approx(0.8 * 0.4 + 0.2 * 0.8)
