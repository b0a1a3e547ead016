"""When each frame of a decoded chunk is sent: evenly over the chunk's period, never later than one period. Pure.

Called by `serving.session` in live mode; lossless output leaves at once.
"""

from __future__ import annotations

from dataclasses import dataclass

SMOOTHING = 0.2
"""Weight of the newest interval in the measured period."""
MAX_CHANGE = 2.0
"""One interval counts at most so many times the period, so that a pause of the camera does not become a delay."""


@dataclass(frozen=True)
class Pace:
    """What is known of the rhythm of decoded chunks. Times in seconds on one clock."""

    period_s: float | None = None
    """Measured time from chunk to chunk; None until two have been decoded."""
    decoded_s: float | None = None
    """When the last chunk was decoded."""
    next_s: float = float("-inf")
    """When the frame after the last planned one would be due."""


def plan_chunk(pace: Pace, now_s: float, num_frames: int) -> tuple[Pace, list[float]]:
    """The send times of the `num_frames` frames of a chunk that is decoded now, and the pace after it.

    A chunk that comes early waits for the one before to end, but not longer than one frame's time, so that no frame is
    held for more than one period after its decoding.
    """
    period_s = _period(pace, now_s)
    if period_s is None:
        return Pace(None, now_s, now_s), [now_s] * num_frames
    step_s = period_s / num_frames
    start_s = min(max(pace.next_s, now_s), now_s + step_s)
    due_s = [start_s + number * step_s for number in range(num_frames)]
    return Pace(period_s, now_s, due_s[-1] + step_s), due_s


def _period(pace: Pace, now_s: float) -> float | None:
    if pace.decoded_s is None:
        return None
    interval_s = max(now_s - pace.decoded_s, 1e-3)
    if pace.period_s is None:
        return interval_s
    interval_s = min(interval_s, MAX_CHANGE * pace.period_s)
    return (1 - SMOOTHING) * pace.period_s + SMOOTHING * interval_s
