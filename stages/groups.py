"""How many sessions of a call go through a network at once. Used by the stages.

A GPU takes all of them together. A CPU takes two: what the layers of more hand to one another falls out of its caches,
and four at once took longer than four one after another (`python -m stages.batch_cost`). In bfloat16 it takes one: sums
of another shape are rounded otherwise, and there it shows who else is there.
"""

from __future__ import annotations

import torch

NUM_ON_CPU = 2


def groups(num_sessions: int, parameter: torch.Tensor) -> list[slice]:
    """The parts of a call's sessions, in their order, that go through a network one after another; `parameter` is any
    of the network's."""
    size = max(num_sessions, 1)
    if parameter.device.type == "cpu":
        size = 1 if parameter.dtype == torch.bfloat16 else NUM_ON_CPU
    return [slice(start, min(start + size, num_sessions)) for start in range(0, num_sessions, size)]
