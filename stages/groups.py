"""How many sessions of a call go through a network at once. Used by the denoise and decode stages.

A GPU takes all of them together. A CPU takes two: what the layers of more hand to one another falls out of its caches,
and four at once took longer than four one after another (`python -m stages.batch_cost`).
"""

from __future__ import annotations

import torch

NUM_ON_CPU = 2


def groups(num_sessions: int, device: torch.device) -> list[slice]:
    """The parts of a call's sessions, in their order, that go through a network one after another."""
    size = NUM_ON_CPU if device.type == "cpu" else max(num_sessions, 1)
    return [slice(start, min(start + size, num_sessions)) for start in range(0, num_sessions, size)]
