"""Motion encoder: a face crop to motion tokens (a FAN trunk with three patch-attention layers, spec section 7).

Called by the motion stage on every face crop. The tensor names are the official ones.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import MotionEncoderConfig
from stages.networks.layers import Attention, FeedForward

GROUP_NORM_EPS = 1e-6
# The batch norm of the shortcuts alone differs from torch's 1e-5.
SHORTCUT_NORM_EPS = 1e-4


def sinusoids(num_positions: int, dim: int) -> Tensor:
    """(num_positions, dim) table: sines in the first half of the channels, cosines in the second."""
    # On the CPU even while the network is built on the meta device: tables are computed, not all of them are loaded.
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim // 2))
    angles = torch.arange(num_positions, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def grid_positions(side: int, dim: int) -> Tensor:
    """(1, side², dim) table of a square grid, row-major: half of the channels say the column, half the row."""
    line = sinusoids(side, dim // 2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "row column c -> 1 (row column) c")


class ConvBlock(nn.Module):
    """Three pre-activated convolutions whose outputs are concatenated (1/2 + 1/4 + 1/4 of `out`), with a shortcut."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half, quarter = out_channels // 2, out_channels // 4
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, quarter, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(quarter)
        self.conv3 = nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.downsample = None if in_channels == out_channels else _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(F.relu(self.bn1(x)))
        second = self.conv2(F.relu(self.bn2(first)))
        third = self.conv3(F.relu(self.bn3(second)))
        return torch.cat([first, second, third], dim=1) + (x if self.downsample is None else self.downsample(x))


def _shortcut(in_channels: int, out_channels: int) -> nn.Sequential:
    norm = nn.BatchNorm2d(in_channels, eps=SHORTCUT_NORM_EPS)
    return nn.Sequential(norm, nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1, bias=False))


class Hourglass(nn.Module):
    """At each of `depth` levels: a branch at full size plus one at half size; (n, c, h, w) to the same."""

    def __init__(self, depth: int, channels: int):
        super().__init__()
        self.depth = depth
        names = [f"b{branch}_{level}" for level in range(1, depth + 1) for branch in (1, 2, 3)]
        for name in (*names, "b2_plus_1"):
            self.add_module(name, ConvBlock(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self._level(self.depth, x)

    def _level(self, level: int, x: Tensor) -> Tensor:
        upper = self._apply_block(f"b1_{level}", x)
        lower = self._apply_block(f"b2_{level}", F.max_pool2d(x, 2))
        lower = self._level(level - 1, lower) if level > 1 else self._apply_block("b2_plus_1", lower)
        lower = self._apply_block(f"b3_{level}", lower)
        return upper + F.interpolate(lower, size=upper.shape[2:], mode="bilinear", align_corners=False)

    def _apply_block(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x)


class PatchEmbed(nn.Module):
    """(n, c, side · p, side · p) to position-coded tokens (n, side², dim)."""

    positions: Tensor

    def __init__(self, channels: int, dim: int, patch: int, side: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.register_buffer("positions", grid_positions(side, dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # As a product of matrices: in bfloat16 on CPUs with AMX, torch's convolution by steps of 4 is off by as much as
        # its result for 16 and 24 channels.
        patch = self.proj.kernel_size[0]
        squares = rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=patch, q=patch)
        return F.linear(squares, self.proj.weight.flatten(1), self.proj.bias) + self.positions


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward over (n, l, dim)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attention_blocks = nn.ModuleList([Attention(dim, dim, num_heads)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim)])
        self.ff = FeedForward(dim)
        self.ff_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention_blocks[0](normed, normed)
        return x + self.ff(self.ff_norm(x))


class PatchAttention(nn.Module):
    """Attention between the p x p squares of a feature map; (n, channels, side · p, side · p) to the same."""

    def __init__(self, channels: int, patch: int, side: int, config: MotionEncoderConfig):
        super().__init__()
        dim = config.attention_dim
        self.patch, self.side = patch, side
        self.norm = nn.GroupNorm(config.num_norm_groups, channels, eps=GROUP_NORM_EPS)
        self.pos_embed = PatchEmbed(channels, dim, patch, side)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, config.num_attention_heads)])
        self.proj_out = nn.Linear(dim // patch**2, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.transformer_blocks[0](self.pos_embed(self.norm(x)))
        pixels = rearrange(tokens, "n (h w) (p q c) -> n (h p) (w q) c", h=self.side, p=self.patch, q=self.patch)
        return x + rearrange(self.proj_out(pixels), "n h w c -> n c h w")


class Trunk(nn.Module):
    """Face crops (n, 3, crop_px, crop_px) to one vector (n, num_tokens · token_dim)."""

    def __init__(self, config: MotionEncoderConfig):
        super().__init__()
        stem, mid, trunk = config.stem_channels, config.mid_channels, config.trunk_channels
        side, num_landmarks = config.crop_px // 8, config.num_landmarks
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = ConvBlock(stem, mid)
        self.att_1 = PatchAttention(mid, 4, side, config)
        self.conv3 = ConvBlock(mid, mid)
        self.conv4 = ConvBlock(mid, trunk)
        self.att_2 = PatchAttention(trunk, 2, side, config)
        self.m0 = Hourglass(config.hourglass_depth, trunk)
        self.top_m_0 = ConvBlock(trunk, trunk)
        self.conv_last0 = nn.Conv2d(trunk, trunk, 1)
        self.bn_end0 = nn.BatchNorm2d(trunk)
        self.att_3 = PatchAttention(trunk, 2, side, config)
        self.l0 = nn.Conv2d(trunk, num_landmarks, 1)
        self.bn5 = nn.BatchNorm2d(num_landmarks)
        self.conv6 = nn.Conv2d(num_landmarks, 1, 3, stride=2, padding=1)
        self.fc = nn.Linear(side**2, config.num_tokens * config.token_dim)

    def forward(self, crops: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(crops)))
        x = F.max_pool2d(self.att_1(self.conv2(x)), 2)
        x = self.att_2(self.conv4(self.conv3(x)))
        x = self.bn_end0(self.conv_last0(self.top_m_0(self.m0(x))))
        x = F.relu(self.bn5(self.l0(F.relu(self.att_3(x)))))
        return self.fc(F.relu(self.conv6(x).flatten(1)))


class MotionEncoder(nn.Module):
    """Face crops (n, 3, crop_px, crop_px) in [-1, 1] to motion tokens (n, num_tokens, token_dim)."""

    pe: Tensor

    def __init__(self, config: MotionEncoderConfig):
        super().__init__()
        self.num_tokens = config.num_tokens
        width = config.num_tokens * config.token_dim
        self.model = Trunk(config)
        self.final_proj = nn.Linear(width, width)
        self.register_buffer("pe", sinusoids(config.num_tokens, config.token_dim)[None])

    def forward(self, crops: Tensor) -> Tensor:
        tokens = rearrange(self.final_proj(self.model(crops)), "n (t d) -> n t d", t=self.num_tokens)
        return tokens + self.pe
