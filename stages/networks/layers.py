"""Building blocks that several networks share: attention, feed-forward, residual block, resampling, time embedding.

Parameter names are the official checkpoints' names, so that weights load without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class Layers(nn.Module, Generic[M]):
        """An nn.ModuleList that says what its entries are."""

        def __init__(self, modules: Iterable[M] = ()) -> None: ...
        def __len__(self) -> int: ...
        def __iter__(self) -> Iterator[M]: ...
        def __getitem__(self, index: int) -> M: ...
        def __setitem__(self, index: int, module: M) -> None: ...
        def extend(self, modules: Iterable[M]) -> None: ...

else:
    Layers = nn.ModuleList


MAX_WRITTEN_OUT_KEYS = 512
"""With more keys the table of all scores would need too much memory."""


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(b, l, heads · d) to (b, heads, l, d)."""
    return rearrange(x, "b l (h d) -> b h l d", h=num_heads)


def merge_heads(x: Tensor) -> Tensor:
    """(b, heads, l, d) to (b, l, heads · d)."""
    return rearrange(x, "b h l d -> b l (h d)")


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(head size): (b, heads, l, d), twice (b, heads, m, d) to (b, heads, l, d).

    seen (l, m) bool: which keys each query looks at, at least one; None: all.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] <= MAX_WRITTEN_OUT_KEYS:
        # torch's fused attention takes twice as long for as few keys in bfloat16, and so does its softmax.
        scores = (query * query.shape[-1] ** -0.5) @ rearrange(key, "b h m d -> b h d m")
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        return scores.float().softmax(dim=-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


class Attention(nn.Module):
    """Multi-head attention; queries from `x`, keys and values from `context`, scaled by 1/sqrt(head size)."""

    def __init__(self, dim: int, context_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = Layers([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor, seen: Tensor | None = None) -> Tensor:
        """x (b, l, dim), context (b, m, context_dim) to (b, l, dim); `seen` (l, m) as in `attend`."""
        query = split_heads(self.to_q(x), self.num_heads)
        key = split_heads(self.to_k(context), self.num_heads)
        value = split_heads(self.to_v(context), self.num_heads)
        return self.to_out[0](merge_heads(attend(query, key, value, seen)))


class GEGLU(nn.Module):
    """Linear to twice the width; the first half is the value, the second half the gate (exact GELU)."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        # Two products rather than the halves of one: a half is not contiguous, which costs as much as the product.
        value, gate = (
            F.linear(x, weight, bias)
            for weight, bias in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        )
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width and back. `net.1` is the place of the checkpoints' dropout."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = Layers([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Residual(nn.Module):
    """A module that adds to its input what its last layer makes of its work: nothing, where that layer is zero."""

    rests = False
    """Whether it leaves its work undone."""

    @property
    def last(self) -> nn.Module:
        """The layer whose result is added."""
        raise NotImplementedError


def rest_idle_modules(network: nn.Module) -> int:
    """Lets modules rest whose last layer makes nothing of their work, as temporal ones do before phase `stream` and
    others after `training.thin`: the answer stays, and is there sooner. Not for training. Returns how many began to."""
    idle = [
        module
        for module in network.modules()
        if isinstance(module, Residual) and not (module.rests or any(part.any() for part in module.last.parameters()))
    ]
    for module in idle:
        module.rests = True
    return len(idle)


class ResnetBlock(Residual):
    """Two 3x3 convolutions with GroupNorm and SiLU, a time embedding between them (unless `time_dim` is None)."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None, num_groups: int, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (n, in, h, w), time (n, time_dim) already through SiLU, to (n, out, h, w)."""
        straight = x if self.conv_shortcut is None else self.conv_shortcut(x)
        if self.rests:
            return straight
        residual = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            residual = residual + rearrange(self.time_emb_proj(time), "n c -> n c 1 1")
        return self.conv2(F.silu(self.norm2(residual))) + straight

    @property
    def last(self) -> nn.Module:
        return self.conv2


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded on all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour growth to `size` (h, w), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class TimeEmbedding(nn.Module):
    """Timesteps (n,) to (n, dim): sinusoids of `num_sinusoids` channels, cosine half first, then two linear layers."""

    def __init__(self, num_sinusoids: int, dim: int):
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.linear_1 = nn.Linear(num_sinusoids, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.num_sinusoids // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


def temporal_positions(num_positions: int, dim: int) -> Tensor:
    """(num_positions, dim) table: sine on even, cosine on odd channels, wavelengths up to 10000 · 2π frames."""
    # On the CPU even while a network is built on the meta device: the table is computed, never loaded.
    position = torch.arange(num_positions, device="cpu")[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device="cpu") * (-math.log(10000.0) / dim))
    table = torch.zeros(num_positions, dim, device="cpu")
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table
