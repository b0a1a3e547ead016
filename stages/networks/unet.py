"""The two UNets: the reference UNet (2D) writes features, the denoising UNet (3D) reads them.

Both have the shape of Stable Diffusion 1.5. Frames are folded into the batch: every convolution and norm acts on single
frames, only the temporal modules look along time. The denoising UNet adds to each layer a cross-attention to motion
tokens (motion module) and a self-attention along the window (temporal module), and its self-attention reads, besides
the frame's own tokens, a *memory*: the reference UNet's features of the portrait and of keyframes. Modules hold weights
and nothing else; memories are values that the caller keeps (see `stages.window`).

Two exact savings over the paper's program: keys and values of a memory are projected once, not in every call for every
frame; and attention to the single image token is the constant `to_out(to_v(token))`, so its queries, keys and norm do
not exist here. The reference UNet ends at the last features it writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from stages.config import UNetConfig
from stages.networks.layers import (
    Attention,
    Downsample,
    FeedForward,
    Layers,
    Residual,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    attend,
    merge_heads,
    split_heads,
    temporal_positions,
)


@dataclass(frozen=True)
class LayerMemory:
    """What one attention layer of the denoising UNet reads of one session."""

    keys: Tensor
    """(heads, m, d), m = tokens of the portrait and of all keyframes so far."""
    values: Tensor
    """(heads, m, d)."""
    constant: Tensor
    """(C,) the answer of the attention to the image token."""


Memory = tuple[LayerMemory, ...]
"""One entry per attention layer, in the order in which the denoising UNet runs them (`attention_names`)."""


class TokenAttention(nn.Module):
    """Cross-attention to a single token: the softmax over one key is 1, so it does not depend on the query."""

    def __init__(self, dim: int, token_dim: int):
        super().__init__()
        self.to_v = nn.Linear(token_dim, dim, bias=False)
        self.to_out = Layers([nn.Linear(dim, dim)])

    def forward(self, token: Tensor) -> Tensor:
        """(..., token_dim) to (..., dim)."""
        return self.to_out[0](self.to_v(token))


class TransformerBlock(nn.Module):
    """Self-attention, image token, feed-forward, each added to the input."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, config.num_heads)
        self.attn2 = TokenAttention(dim, config.cross_attention_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def write(self, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Reference pass: x (1, L, C), token (cross_attention_dim,) to the output and the features LN1(x)."""
        features = self.norm1(x)
        x = x + self.attn1(features, features)
        x = x + self.attn2(token)
        return x + self.ff(self.norm3(x)), features

    def read(self, x: Tensor, memories: Sequence[LayerMemory]) -> Tensor:
        """Denoising pass: x (sessions · frames, L, C), one memory per session."""
        x = x + read_memories(self.attn1, self.norm1(x), memories)
        constant = torch.stack([memory.constant for memory in memories])
        x = x + repeat(constant, "b c -> (b f) 1 c", f=x.shape[0] // len(memories))
        return x + self.ff(self.norm3(x))


def read_memories(attention: Attention, x: Tensor, memories: Sequence[LayerMemory]) -> Tensor:
    """Self-attention of each frame over its own tokens followed by its session's memory (paper, section 3.3).

    Projections are batched over sessions; the attention runs once per session, since memories differ in length.
    """
    parts = [split_heads(layer(x), attention.num_heads) for layer in (attention.to_q, attention.to_k, attention.to_v)]
    per_session = zip(*(part.chunk(len(memories)) for part in parts), memories, strict=True)
    outputs = []
    for query, key, value, memory in per_session:
        keys = torch.cat([key, memory.keys.expand(len(key), -1, -1, -1)], dim=2)
        values = torch.cat([value, memory.values.expand(len(value), -1, -1, -1)], dim=2)
        outputs.append(attend(query, keys, values))
    return attention.to_out[0](merge_heads(torch.cat(outputs)))


class ReferenceAttention(Residual):
    """A transformer block around which 1x1 convolutions lead from image to tokens and back."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.num_norm_groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = Layers([TransformerBlock(dim, config)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def write(self, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """x (1, C, h, w) to the output of the same shape and the features (1, h · w, C)."""
        tokens, features = self.transformer_blocks[0].write(to_tokens(self.proj_in(self.norm(x))), token)
        return x + self.proj_out(to_image(tokens, x)), features

    def read(self, x: Tensor, memories: Sequence[LayerMemory]) -> Tensor:
        """x (sessions · frames, C, h, w), one memory per session."""
        if self.rests:
            return x
        tokens = self.transformer_blocks[0].read(to_tokens(self.proj_in(self.norm(x))), memories)
        return x + self.proj_out(to_image(tokens, x))

    @property
    def last(self) -> nn.Module:
        return self.proj_out


class LastFeatures(nn.Module):
    """The last attention of the reference UNet: only its features are wanted, nothing behind them is ever used."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.num_norm_groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = Layers([nn.ModuleDict({"norm1": nn.LayerNorm(dim)})])

    def write(self, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.transformer_blocks[0]["norm1"](to_tokens(self.proj_in(self.norm(x))))


def to_tokens(x: Tensor) -> Tensor:
    """(n, C, h, w) to (n, h · w, C), row by row."""
    return rearrange(x, "n c h w -> n (h w) c")


def to_image(tokens: Tensor, like: Tensor) -> Tensor:
    """(n, h · w, C) to the shape of `like`."""
    return rearrange(tokens, "n (h w) c -> n c h w", h=like.shape[-2]).contiguous()


class SideBlock(nn.Module):
    """Two attentions and a feed-forward: the inside of a motion or a temporal module."""

    def __init__(self, dim: int, context_dim: int, num_heads: int):
        super().__init__()
        self.attention_blocks = Layers([Attention(dim, context_dim, num_heads) for _ in range(2)])
        self.norms = Layers([nn.LayerNorm(dim) for _ in range(2)])
        self.ff = FeedForward(dim)
        self.ff_norm = nn.LayerNorm(dim)


class SideTransformer(nn.Module):
    """Norm and linear layers around a SideBlock; the official name of this level is `temporal_transformer`."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, num_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = Layers([SideBlock(dim, context_dim, num_heads)])
        self.proj_out = nn.Linear(dim, dim)


class MotionModule(Residual):
    """Cross-attention of each frame's pixels to that frame's motion tokens (paper, section 3.1)."""

    def __init__(self, dim: int, config: UNetConfig, token_dim: int):
        super().__init__()
        self.temporal_transformer = SideTransformer(dim, token_dim, config.num_motion_heads, config.num_norm_groups)

    def forward(self, x: Tensor, motion: Tensor) -> Tensor:
        """x (n, C, h, w), motion (n, T, D) to (n, C, h, w)."""
        if self.rests:
            return x
        outer = self.temporal_transformer
        inner = outer.transformer_blocks[0]
        tokens = outer.proj_in(to_tokens(outer.norm(x)))
        for attention, norm in zip(inner.attention_blocks, inner.norms, strict=True):
            tokens = tokens + attention(norm(tokens), motion)
        tokens = tokens + inner.ff(inner.ff_norm(tokens))
        return x + to_image(outer.proj_out(tokens), x)

    @property
    def last(self) -> nn.Module:
        return self.temporal_transformer.proj_out


class TemporalModule(Residual):
    """Self-attention of each pixel along the window; positions count from the oldest frame (paper, section 3.3).

    Bidirectional, unless `chunk_causal` hides the chunks that are noisier than a frame's own.
    """

    positions: Tensor

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.temporal_transformer = SideTransformer(dim, dim, config.num_temporal_heads, config.num_norm_groups)
        self.register_buffer("positions", temporal_positions(config.max_positions, dim), persistent=False)
        self.chunk_causal = config.chunk_causal

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x (sessions · num_frames, C, h, w) to the same shape."""
        if self.rests:
            return x
        outer = self.temporal_transformer
        inner = outer.transformer_blocks[0]
        tokens = outer.proj_in(to_tokens(outer.norm(x)))
        tokens = rearrange(tokens, "(b f) l c -> (b l) f c", f=num_frames)
        seen = chunk_causal_mask(num_frames, self.chunk_causal, x.device) if self.chunk_causal else None
        for attention, norm in zip(inner.attention_blocks, inner.norms, strict=True):
            placed = norm(tokens) + self.positions[:num_frames]
            tokens = tokens + attention(placed, placed, seen)
        tokens = tokens + inner.ff(inner.ff_norm(tokens))
        tokens = rearrange(tokens, "(b l) f c -> (b f) l c", l=x.shape[-2] * x.shape[-1])
        return x + to_image(outer.proj_out(tokens), x)

    @property
    def last(self) -> nn.Module:
        return self.temporal_transformer.proj_out


def chunk_causal_mask(num_frames: int, chunk_frames: int, device: torch.device | str = "cpu") -> Tensor:
    """(num_frames, num_frames) bool, oldest frame first: row i is true where frame i looks, at its own chunk and the
    older, cleaner ones."""
    chunks = torch.arange(num_frames, device=device) // chunk_frames
    return rearrange(chunks, "f -> f 1") >= rearrange(chunks, "f -> 1 f")


@dataclass(frozen=True)
class BlockPlan:
    """Sizes of one block: which channels enter each layer's resnet, whether it attends, how it resamples."""

    layer_channels: tuple[int, ...]
    channels: int
    attends: bool
    resamples: Literal["down", "up"] | None


def down_plans(config: UNetConfig) -> list[BlockPlan]:
    """Blocks from the finest to the coarsest resolution."""
    widths, attends = config.block_channels, config.attention_levels
    entries = [widths[0], *widths[:-1]]
    return [
        BlockPlan(
            layer_channels=(entry, *[channels] * (config.layers_per_block - 1)),
            channels=channels,
            attends=attends[level],
            resamples="down" if level < len(widths) - 1 else None,
        )
        for level, (entry, channels) in enumerate(zip(entries, widths, strict=True))
    ]


def up_plans(config: UNetConfig) -> list[BlockPlan]:
    """Blocks from the coarsest to the finest resolution; each layer also takes one skip from the way down."""
    widths, num_layers = config.block_channels, config.layers_per_block + 1
    plans = []
    for level in reversed(range(len(widths))):
        channels = widths[level]
        entries = [widths[min(level + 1, len(widths) - 1)], *[channels] * (num_layers - 1)]
        skips = [*[channels] * (num_layers - 1), widths[max(level - 1, 0)]]
        layer_channels = tuple(entry + skip for entry, skip in zip(entries, skips, strict=True))
        plans.append(BlockPlan(layer_channels, channels, config.attention_levels[level], "up" if level > 0 else None))
    return plans


class Block(nn.Module):
    """One resolution: layers of a resnet, an attention (if the plan attends), a motion and a temporal module (if
    `token_dim` is given, that is in the denoising UNet), then at most one resampler."""

    def __init__(self, plan: BlockPlan, config: UNetConfig, token_dim: int | None):
        super().__init__()
        time_dim, layers = time_width(config), range(len(plan.layer_channels))
        self.resnets = Layers(
            [ResnetBlock(entry, plan.channels, time_dim, config.num_norm_groups) for entry in plan.layer_channels]
        )
        self.attentions: Layers[ReferenceAttention | LastFeatures] = Layers(
            [ReferenceAttention(plan.channels, config) for _ in layers if plan.attends]
        )
        self.motion_modules: Layers[MotionModule] = Layers()
        self.temporal_modules: Layers[TemporalModule] = Layers()
        if token_dim is not None:
            self.motion_modules.extend([MotionModule(plan.channels, config, token_dim) for _ in layers])
            self.temporal_modules.extend([TemporalModule(plan.channels, config) for _ in layers])
        self.downsamplers = Layers([Downsample(plan.channels)] if plan.resamples == "down" else [])
        self.upsamplers = Layers([Upsample(plan.channels)] if plan.resamples == "up" else [])


class MidBlock(nn.Module):
    """Resnet, attention (and motion and temporal module), resnet at the coarsest resolution."""

    def __init__(self, config: UNetConfig, token_dim: int | None):
        super().__init__()
        channels = config.block_channels[-1]
        self.resnets = Layers(
            [ResnetBlock(channels, channels, time_width(config), config.num_norm_groups) for _ in range(2)]
        )
        self.attentions: Layers[ReferenceAttention | LastFeatures] = Layers([ReferenceAttention(channels, config)])
        self.motion_modules: Layers[MotionModule] = Layers()
        self.temporal_modules: Layers[TemporalModule] = Layers()
        if token_dim is not None:
            self.motion_modules.extend([MotionModule(channels, config, token_dim)])
            self.temporal_modules.extend([TemporalModule(channels, config)])


def time_width(config: UNetConfig) -> int:
    """Width of the time embedding."""
    return 4 * config.block_channels[0]


class ReferenceUNet(nn.Module):
    """Writes, for one clean latent, the features that the denoising UNet's attentions read."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(config.in_channels, config.block_channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(config.block_channels[0], time_width(config))
        plans = up_plans(config)
        last = max(index for index, plan in enumerate(plans) if plan.attends)
        plans[last] = replace(plans[last], resamples=None)
        self.down_blocks = Layers([Block(plan, config, None) for plan in down_plans(config)])
        self.up_blocks = Layers([Block(plan, config, None) for plan in plans[: last + 1]])
        self.up_blocks[last].attentions[-1] = LastFeatures(plans[last].channels, config)
        self.mid_block = MidBlock(config, None)

    def forward(self, latent: Tensor, token: Tensor) -> list[Tensor]:
        """latent (1, c, h, w), token (cross_attention_dim,) to features (L, C) per layer, as `attention_names` lists.

        The timestep is 0 (specification: the reference is clean).
        """
        time = F.silu(self.time_embedding(torch.zeros(1, device=latent.device)))
        features: list[Tensor] = []
        x = self.conv_in(latent)
        skips = [x]
        for block in self.down_blocks:
            for index, resnet in enumerate(block.resnets):
                x = write_layer(block, index, resnet(x, time), token, features)
                skips.append(x)
            for downsampler in block.downsamplers:
                x = downsampler(x)
                skips.append(x)
        x = write_layer(self.mid_block, 0, self.mid_block.resnets[0](x, time), token, features)
        x = self.mid_block.resnets[1](x, time)
        for block in self.up_blocks:
            for index, resnet in enumerate(block.resnets):
                x = write_layer(block, index, resnet(torch.cat([x, skips.pop()], dim=1), time), token, features)
            for upsampler in block.upsamplers:
                x = upsampler(x, skips[-1].shape[-2:])
        return features


def write_layer(block: Block | MidBlock, index: int, x: Tensor, token: Tensor, features: list[Tensor]) -> Tensor:
    """One layer's attention in the reference pass; appends its features."""
    if not block.attentions:
        return x
    x, written = block.attentions[index].write(x, token)
    features.append(written[0])
    return x


@dataclass(frozen=True)
class Conditions:
    """What every layer of one denoiser call reads."""

    time: Tensor
    """(n, 4 · c0) time embedding through SiLU."""
    motion: Tensor
    """(n, T, D)."""
    memories: Iterator[Sequence[LayerMemory]]
    """For each attention in turn, one memory per session."""
    num_frames: int


class DenoisingUNet(nn.Module):
    """Predicts the noise (or the clean latents) of a window, for one or several sessions in one call."""

    def __init__(self, config: UNetConfig, token_dim: int):
        super().__init__()
        c0 = config.block_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, c0, 3, padding=1)
        self.time_embedding = TimeEmbedding(c0, time_width(config))
        self.motion_in = nn.Linear(token_dim, time_width(config)) if config.motion_in_time else None
        self.down_blocks = Layers([Block(plan, config, token_dim) for plan in down_plans(config)])
        self.up_blocks = Layers([Block(plan, config, token_dim) for plan in up_plans(config)])
        self.mid_block = MidBlock(config, token_dim)
        self.conv_norm_out = nn.GroupNorm(config.num_norm_groups, c0, eps=1e-5)
        self.conv_out = nn.Conv2d(c0, config.in_channels * (1 + config.num_bases), 3, padding=1)

    def forward(
        self, latents: Tensor, timesteps: Tensor, motion: Tensor, pose: Tensor, memories: Sequence[Memory]
    ) -> Tensor:
        """latents (b, f, c, h, w), timesteps (f,) or (b, f), motion (b, f, T, D), pose (b, f, c0, h, w) to
        (b, f, c, h, w).

        b = sessions, f = frames of the window, oldest first. Latents and motion may be of any precision. Where
        the pose brings bases (`with_bases`) it has that many times c channels more.
        """
        num_sessions, num_frames = latents.shape[:2]
        dtype = self.conv_in.weight.dtype
        motion = rearrange(motion.to(dtype), "b f t d -> (b f) t d")
        time = self.time_embedding(timesteps.flatten())
        if timesteps.ndim == 1:
            time = time.repeat(num_sessions, 1)
        conditions = Conditions(
            time=F.silu(time if self.motion_in is None else time + self.motion_in(motion.sum(1))),
            motion=motion,
            memories=iter(zip(*memories, strict=True)),
            num_frames=num_frames,
        )
        x = self.conv_in(rearrange(latents.to(dtype), "b f c h w -> (b f) c h w"))
        guide, bases = rearrange(pose, "b f c h w -> (b f) c h w").tensor_split((x.shape[1],), dim=1)
        x = x + guide
        skips = [x]
        for block in self.down_blocks:
            for index in range(len(block.resnets)):
                x = read_layer(block, index, x, conditions)
                skips.append(x)
            for downsampler in block.downsamplers:
                x = downsampler(x)
                skips.append(x)
        x = read_layer(self.mid_block, 0, x, conditions)
        x = self.mid_block.resnets[1](x, conditions.time)
        for block in self.up_blocks:
            for index in range(len(block.resnets)):
                x = read_layer(block, index, torch.cat([x, skips.pop()], dim=1), conditions)
            for upsampler in block.upsamplers:
                x = upsampler(x, skips[-1].shape[-2:])
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return rearrange(with_bases(x, bases), "(b f) c h w -> b f c h w", b=num_sessions)


def with_bases(x: Tensor, bases: Tensor) -> Tensor:
    """The answer (n, c, h, w) from what the network says (n, c · (1 + k), h, w) and k bases (n, c · k, h, w).

    Bases are latents that are nearly the answer. How much of each is taken, the first one wholly unless the network
    says otherwise, is said per channel and place: letting go of a base is easier to learn than drawing its negative.
    """
    if not bases.shape[1]:
        return x
    num_channels = x.shape[1] - bases.shape[1]
    answer, gates = x.split((num_channels, bases.shape[1]), dim=1)
    taken = reduce(gates * bases, "n (k c) h w -> n c h w", "sum", c=num_channels)
    return answer + bases[:, :num_channels] + taken


def read_layer(block: Block | MidBlock, index: int, x: Tensor, conditions: Conditions) -> Tensor:
    """One layer of the denoising UNet: resnet, attention if the block attends, motion module, temporal module."""
    x = block.resnets[index](x, conditions.time)
    if block.attentions:
        attention = block.attentions[index]
        assert isinstance(attention, ReferenceAttention)
        x = attention.read(x, next(conditions.memories))
    x = block.motion_modules[index](x, conditions.motion)
    return block.temporal_modules[index](x, conditions.num_frames)


def attention_names(config: UNetConfig) -> list[str]:
    """Names of the attention layers in running order, which is the order of features and memories."""
    down = [
        f"down_blocks.{block}.attentions.{index}.transformer_blocks.0"
        for block, plan in enumerate(down_plans(config))
        for index in range(len(plan.layer_channels) if plan.attends else 0)
    ]
    up = [
        f"up_blocks.{block}.attentions.{index}.transformer_blocks.0"
        for block, plan in enumerate(up_plans(config))
        for index in range(len(plan.layer_channels) if plan.attends else 0)
    ]
    return [*down, "mid_block.attentions.0.transformer_blocks.0", *up]


def project_memory(unet: DenoisingUNet, names: Sequence[str], features: Sequence[Tensor], token: Tensor) -> Memory:
    """Keys and values of one picture's features (L, C) per layer, and the constant of the image token."""
    return tuple(
        _project_layer(unet.get_submodule(name), layer, token) for name, layer in zip(names, features, strict=True)
    )


def _project_layer(block: nn.Module, features: Tensor, token: Tensor) -> LayerMemory:
    assert isinstance(block, TransformerBlock)
    heads = block.attn1.num_heads
    keys = rearrange(block.attn1.to_k(features), "l (h d) -> h l d", h=heads)
    values = rearrange(block.attn1.to_v(features), "l (h d) -> h l d", h=heads)
    return LayerMemory(keys, values, block.attn2(token))


def extend_memory(memory: Memory, more: Memory) -> Memory:
    """Appends a keyframe's keys and values behind those that are there."""
    return tuple(
        LayerMemory(torch.cat([old.keys, new.keys], 1), torch.cat([old.values, new.values], 1), old.constant)
        for old, new in zip(memory, more, strict=True)
    )
