"""The rate and delay of one session over the last ten seconds, for `/v1/status` and for the log. Pure.

Called by `serving.session` for every frame that a client has shown. Its memory is bounded whatever a client reports.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 10.0
MAX_SAMPLES = 1024
"""Ten seconds of a hundred frames a second; of faster ones less than ten seconds are kept."""


class DelayWindow:
    """What was shown lately: when, and how long after it was captured."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float | None]] = deque(maxlen=MAX_SAMPLES)
        self._began_s: float | None = None

    def add(self, now_s: float, delay_ms: float | None) -> None:
        """One frame was shown; None for the delay of one that has no driving frame, or where it is unknown."""
        self._began_s = now_s if self._began_s is None else self._began_s
        self._samples.append((now_s, delay_ms))
        self._forget(now_s)

    def fps(self, now_s: float) -> float:
        """Frames a second over the window, or over the time since the first frame. Falls to 0 when nothing comes."""
        self._forget(now_s)
        if self._began_s is None or not self._samples:
            return 0.0
        is_full = len(self._samples) == MAX_SAMPLES
        since_s = self._samples[0][0] if is_full else max(self._began_s, now_s - WINDOW_S)
        return round(len(self._samples) / max(now_s - since_s, 1.0), 1)

    def delay_ms(self, now_s: float) -> dict[str, float | None]:
        """`p50` and `p95` over the window; None where nothing was measured."""
        self._forget(now_s)
        delays = sorted(delay for _, delay in self._samples if delay is not None)
        return {"p50": _quantile(delays, 0.5), "p95": _quantile(delays, 0.95)}

    def _forget(self, now_s: float) -> None:
        while self._samples and self._samples[0][0] <= now_s - WINDOW_S:
            self._samples.popleft()


def _quantile(ordered: list[float], share: float) -> float | None:
    """The value that this share of all does not exceed."""
    return round(ordered[math.ceil(share * len(ordered)) - 1], 1) if ordered else None
