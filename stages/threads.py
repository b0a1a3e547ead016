"""How many torch threads a process should use. No torch, so that every package can ask.

`stages.animate` and the members share this default, since the number of threads may change the last bits of a result.
"""

from __future__ import annotations

import os


def default_num_threads() -> int:
    """A third of this process's processors, at least one: motion, denoise and decode run side by side."""
    num_processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_processors // 3)
