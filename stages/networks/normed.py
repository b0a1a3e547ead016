"""Convolutions with batch norms, for small networks that read numbers off pictures: `upright` and `training.probes`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def normed(before: int, after: int, stride: int, momentum: float) -> nn.Sequential:
    """A 3x3 convolution and its norm; `momentum`: by how much a batch moves the norm's statistics."""
    norm = nn.BatchNorm2d(after, momentum=momentum)
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), norm)


class NormedBlock(nn.Module):
    """Two of them beside a shortcut, (n, c, h, w) to the same."""

    def __init__(self, channels: int, momentum: float):
        super().__init__()
        self.first = normed(channels, channels, 1, momentum)
        self.second = normed(channels, channels, 1, momentum)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))
