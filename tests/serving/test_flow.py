import numpy as np
import pytest

from serving.flow import (
    MAX_INTERVAL_S,
    MAX_UNSHOWN_CHUNKS,
    RING_BYTES,
    Progress,
    ReceivedFrame,
    Stamp,
    keep_recent,
    mean_interval_s,
    num_allowed_chunks,
    spread_evenly,
)


def frames(*received_s, num_bytes=1):
    payload = memoryview(bytes(num_bytes))
    return [ReceivedFrame(Stamp(seq, time * 1000, time), payload, 64, 48) for seq, time in enumerate(received_s)]


def seqs(ring):
    return [frame.stamp.seq for frame in ring.frames]


def test_chunks_between_acceptance_and_decode_are_bounded():
    assert num_allowed_chunks(Progress(), max_in_flight=2) == 2
    assert num_allowed_chunks(Progress(accepted=5, decoded=5, shown=5), max_in_flight=3) == 8


def test_a_client_that_shows_nothing_stops_its_own_input():
    for decoded in range(10):
        limit = num_allowed_chunks(Progress(decoded=decoded), max_in_flight=2)
        assert limit <= 2 + MAX_UNSHOWN_CHUNKS


def test_credit_is_never_taken_back():
    shown, limits = 0, []
    for decoded in range(12):
        shown = max(shown, decoded - 3)
        limits.append(num_allowed_chunks(Progress(decoded=decoded, shown=shown), 2))
    assert limits == sorted(limits)


def test_the_ring_holds_three_chunks_of_the_newest_frames():
    ring = keep_recent(frames(*range(20)), now_s=19, period_s=None, chunk_frames=3)
    assert seqs(ring) == list(range(11, 20))
    assert (ring.num_stale, ring.num_surplus) == (0, 11)


def test_the_ring_holds_fewer_of_very_large_frames_but_always_a_chunk():
    ring = keep_recent(frames(*range(9), num_bytes=RING_BYTES // 5), now_s=9, period_s=None, chunk_frames=3)
    assert (seqs(ring), ring.num_surplus) == ([4, 5, 6, 7, 8], 4)
    ring = keep_recent(frames(*range(9), num_bytes=RING_BYTES), now_s=9, period_s=None, chunk_frames=3)
    assert (seqs(ring), ring.num_surplus) == ([6, 7, 8], 6)


def test_frames_older_than_two_periods_are_stale():
    ring = keep_recent(frames(0.0, 0.5, 0.9, 1.0), now_s=1.0, period_s=0.2, chunk_frames=3)
    assert seqs(ring) == [2, 3]
    assert (ring.num_stale, ring.num_surplus) == (2, 0)


def test_a_camera_at_the_pipelines_own_rate_loses_no_frame():
    assert spread_evenly([4.0, 5.0, 6.0], last_time=3.0, num_picked=3) == [0, 1, 2]


def test_a_camera_three_times_as_fast_gives_every_third_frame():
    assert spread_evenly(list(range(1, 13)), last_time=0, num_picked=4) == [2, 5, 8, 11]


def test_the_newest_frame_always_ends_the_chunk():
    rng = np.random.default_rng(0)
    for _ in range(200):
        times = np.cumsum(rng.exponential(1.0, rng.integers(4, 13))).tolist()
        picked = spread_evenly(times, last_time=rng.uniform(-50, times[0]), num_picked=4)
        assert picked[-1] == len(times) - 1
        assert picked == sorted(set(picked)) and len(picked) == 4


def test_a_gap_before_the_ring_does_not_crowd_the_picks():
    times = [100.0 + k for k in range(12)]
    assert spread_evenly(times, last_time=0.0, num_picked=4) == [2, 5, 8, 11]


def test_equal_capture_times_do_not_matter():
    assert spread_evenly([5.0] * 6, last_time=5.0, num_picked=3)[-1] == 5


def test_too_few_frames_are_no_chunk():
    with pytest.raises(ValueError, match="do not make a chunk"):
        spread_evenly([1.0, 2.0], None, 3)


def test_a_pause_hardly_counts_in_the_cameras_rate():
    assert mean_interval_s(None, 0.04) == 0.04
    assert mean_interval_s(0.04, 60.0) == pytest.approx(0.8 * 0.04 + 0.2 * MAX_INTERVAL_S)
