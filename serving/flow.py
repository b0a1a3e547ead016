"""Which driving frames form the next chunk, and how many chunks may be under way: decisions on values, without I/O.

Called by `serving.session`. This is the only place that drops frames; nothing behind it queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_UNSHOWN_CHUNKS = 2
"""Decoded chunks that the client may leave unshown before its input is slowed."""
RING_CHUNKS = 3
"""The ring of recent frames holds so many chunks: 12 frames where a chunk has four."""
RING_BYTES = 8 * 2**20
"""The ring holds no more than one chunk of frames that are too large for this."""
MAX_AGE_PERIODS = 2
SMOOTHING = 0.2
"""Weight of the newest value in the running means."""
MAX_INTERVAL_S = 1.0
"""A longer silence of the camera is a pause, not its rate."""


@dataclass(frozen=True)
class Stamp:
    """Which driving frame, and when."""

    seq: int
    capture_ms: float
    """The client's clock."""
    received_s: float
    """Ours."""


@dataclass(frozen=True)
class ReceivedFrame:
    """A driving frame as it lies in the ring: still encoded, since most of a fast camera's frames are never used."""

    stamp: Stamp
    payload: memoryview
    width: int
    height: int


@dataclass(frozen=True)
class Progress:
    """How far a session is, in chunks: accepted >= decoded >= shown."""

    accepted: int = 0
    decoded: int = 0
    shown: int = 0


def num_allowed_chunks(progress: Progress, max_in_flight: int) -> int:
    """How many chunks may have been accepted by now, all in all.

    At most `max_in_flight` are between acceptance and decode, and at most `MAX_UNSHOWN_CHUNKS` more than that between
    acceptance and the client's receipt. The limit never falls, so it can be given to a client as credit.
    """
    return min(progress.decoded + max_in_flight, progress.shown + max_in_flight + MAX_UNSHOWN_CHUNKS)


@dataclass(frozen=True)
class Ring:
    """The recent frames that were kept, and why the others were not."""

    frames: list[ReceivedFrame]
    num_stale: int
    num_surplus: int


def keep_recent(frames: Sequence[ReceivedFrame], now_s: float, period_s: float | None, chunk_frames: int) -> Ring:
    """What stays of the frames when the newest has come: `RING_CHUNKS` chunks of them, none older than two periods.

    Fewer where they have more than `RING_BYTES`, but never less than a chunk. `period_s`: time from chunk to chunk;
    None: not known yet.
    """
    oldest_s = now_s - MAX_AGE_PERIODS * period_s if period_s is not None else float("-inf")
    fresh = [frame for frame in frames if frame.stamp.received_s >= oldest_s]
    kept = fresh[-RING_CHUNKS * chunk_frames :]
    num_bytes = sum(len(frame.payload) for frame in kept)
    while num_bytes > RING_BYTES and len(kept) > chunk_frames:
        num_bytes -= len(kept.pop(0).payload)
    return Ring(kept, len(frames) - len(fresh), len(fresh) - len(kept))


def spread_evenly(times: Sequence[float], last_time: float | None, num_picked: int) -> list[int]:
    """Indices of `num_picked` of the given increasing times, spread evenly over the time since `last_time`.

    The last one is the newest. `times` has at least `num_picked` entries; `last_time` None: nothing was picked before.
    """
    if not len(times) >= num_picked >= 1:
        raise ValueError(f"{len(times)} frames do not make a chunk of {num_picked}")
    newest = times[-1]
    step = (newest - times[0]) / max(1, len(times) - 1)
    # What fell out of the ring cannot be picked, so the span begins one step before the oldest frame that is left.
    start = times[0] - step if last_time is None else max(last_time, times[0] - step)
    picked: list[int] = []
    for number in range(1, num_picked):
        target = start + (newest - start) * number / num_picked
        first, stop = (picked[-1] + 1 if picked else 0), len(times) - (num_picked - number)
        picked.append(min(range(first, stop), key=lambda index: abs(times[index] - target)))
    return [*picked, len(times) - 1]


def mean_interval_s(mean_s: float | None, interval_s: float) -> float:
    """The running mean of the time between two camera frames, after one more."""
    interval_s = min(interval_s, MAX_INTERVAL_S)
    return interval_s if mean_s is None else (1 - SMOOTHING) * mean_s + SMOOTHING * interval_s
