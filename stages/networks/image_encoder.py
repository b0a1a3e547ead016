"""CLIP vision tower: the portrait to one token. Called by the reference stage, once per portrait.

Computes what transformers' CLIPVisionModelWithProjection computes, with the same tensor names (spec section 8).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config import ImageEncoderConfig
from stages.networks.layers import merge_heads, split_heads


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's cheap approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    """Pictures (n, 3, s, s) to tokens (n, 1 + patches, hidden), the class token first."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        num_patches = (config.image_px // config.patch_px) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_dim))
        self.patch_embedding = nn.Conv2d(3, config.hidden_dim, config.patch_px, stride=config.patch_px, bias=False)
        self.position_embedding = nn.Embedding(1 + num_patches, config.hidden_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixels), "n c h w -> n (h w) c")
        first = repeat(self.class_embedding, "c -> n 1 c", n=len(patches))
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases everywhere."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query = split_heads(self.q_proj(x), self.num_heads)
        key = split_heads(self.k_proj(x), self.num_heads)
        value = split_heads(self.v_proj(x), self.num_heads)
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(query, key, value)))


class Mlp(nn.Module):
    """Two linear layers around the configured activation."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_dim, config.intermediate_dim)
        self.fc2 = nn.Linear(config.intermediate_dim, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)
        self.self_attn = SelfAttention(config.hidden_dim, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """All layers in order."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.num_layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """Pictures to the normalised class token (n, hidden)."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        # The checkpoints spell it so.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_dim, eps=config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(tokens[:, 0])


class ImageEncoder(nn.Module):
    """CLIP-normalised pictures (n, 3, image_px, image_px) to embeddings (n, projection_dim), not normalised."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.vision_model = VisionTower(config)
        self.visual_projection = nn.Linear(config.hidden_dim, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixels))
