"""The motion encoder's shapes, position tables and layouts at unequal small sizes."""

import math

import pytest
import torch

from stages.config import MotionEncoderConfig
from stages.networks.motion_encoder import (
    Hourglass,
    MotionEncoder,
    PatchAttention,
    PatchEmbed,
    grid_positions,
    sinusoids,
)

SMALL = MotionEncoderConfig(
    crop_px=40,
    stem_channels=6,
    mid_channels=8,
    trunk_channels=12,
    num_landmarks=7,
    attention_dim=32,
    num_attention_heads=2,
    num_norm_groups=4,
    hourglass_depth=3,
    num_tokens=5,
    token_dim=6,
)


@torch.no_grad()
def test_a_crop_becomes_the_configured_tokens_independently_of_its_batch():
    torch.manual_seed(0)
    encoder = MotionEncoder(SMALL).eval()
    crops = torch.rand(3, 3, 40, 40) * 2 - 1
    tokens = encoder(crops)
    assert tokens.shape == (3, 5, 6)
    torch.testing.assert_close(encoder(crops[1:2]), tokens[1:2])


@torch.no_grad()
def test_tokens_are_the_projection_plus_their_positions():
    torch.manual_seed(0)
    encoder = MotionEncoder(SMALL).eval()
    encoder.final_proj.weight.zero_()
    encoder.final_proj.bias.copy_(torch.arange(30.0))
    expected = torch.arange(30.0).reshape(5, 6) + sinusoids(5, 6)
    torch.testing.assert_close(encoder(torch.zeros(1, 3, 40, 40))[0], expected)


def test_sinusoids_put_sines_before_cosines():
    table = sinusoids(3, 4)
    expected = [math.sin(2), math.sin(2 / 100), math.cos(2), math.cos(2 / 100)]
    torch.testing.assert_close(table[2], torch.tensor(expected))


def test_grid_positions_say_the_column_first_then_the_row():
    table = grid_positions(3, 8)[0]
    row, column = 2, 1
    expected = torch.cat([sinusoids(3, 4)[column], sinusoids(3, 4)[row]])
    torch.testing.assert_close(table[row * 3 + column], expected)


@torch.no_grad()
def test_hourglass_keeps_odd_sizes():
    torch.manual_seed(0)
    x = torch.rand(2, 8, 11, 11)
    assert Hourglass(3, 8).eval()(x).shape == x.shape


@torch.no_grad()
def test_patch_attention_puts_every_patch_back_where_it_came_from():
    torch.manual_seed(0)
    attention = PatchAttention(4, 2, 3, SMALL).eval()
    block = attention.transformer_blocks[0]
    # Without attention and feed-forward, a patch may only change through its own projection.
    for layer in (block.attention_blocks[0].to_out[0], block.ff.net[2]):
        layer.weight.zero_()
        layer.bias.zero_()
    attention.norm = torch.nn.Identity()
    x = torch.rand(1, 4, 6, 6)
    touched = x.clone()
    touched[:, :, 2:4, 4:6] += 1
    changed = (attention(touched) - attention(x)).abs().amax(dim=1)[0] > 1e-4
    assert changed[2:4, 4:6].any()
    changed[2:4, 4:6] = False
    assert not changed.any()


@torch.no_grad()
@pytest.mark.parametrize("channels", [16, 24, 32])
def test_patches_are_embedded_as_by_a_convolution_in_bfloat16_too(channels):
    torch.manual_seed(0)
    embed, maps = PatchEmbed(channels, 32, 4, 8), torch.randn(2, channels, 32, 32)
    expected = embed.proj(maps).flatten(2).mT + embed.positions
    torch.testing.assert_close(embed(maps), expected)
    coarse = embed.bfloat16()(maps.bfloat16()).float()
    assert (coarse - expected).abs().max() < 0.05
