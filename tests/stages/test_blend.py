"""How layers are laid over one another: what it starts as, what it sees, and that frames do not see each other."""

from __future__ import annotations

import pytest
import torch

from stages.networks.blend import MAX_LOGIT, Blend

SIDE = 12


@pytest.fixture
def learned() -> Blend:
    """One that does something."""
    torch.manual_seed(0)
    blend = Blend()
    torch.nn.init.normal_(blend.conv_out.weight, std=0.1)
    return blend


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layers (2, 3, 3, 12, 12), logits (2, 3, 12, 12) and what the head covers (2, 1, 12, 12)."""
    generator = torch.Generator().manual_seed(seed)
    layers, cover = (torch.rand(2, *parts, SIDE, SIDE, generator=generator) for parts in ((3, 3), (1,)))
    return layers, torch.randn(2, 3, SIDE, SIDE, generator=generator), cover


@torch.no_grad()
def test_before_anything_is_learned_shares_stay_as_they_are_within_bounds():
    layers, shares, cover = drawn(1)
    torch.testing.assert_close(Blend()(layers, shares, cover), shares)
    assert (Blend()(layers, shares + 1e30, cover) == MAX_LOGIT).all()


@torch.no_grad()
def test_shares_depend_on_the_colours_of_every_layer_nearby(learned):
    layers, shares, cover = drawn(2)
    before = learned(layers, shares, cover)
    assert before.shape == shares.shape
    for layer in range(3):
        changed = layers.clone()
        changed[:, layer, :, :2, :2] = 1 - changed[:, layer, :, :2, :2]
        off = (learned(changed, shares, cover) - before).abs()
        assert off[..., :2, :2].max() > 1e-3 and off[..., 10:, 10:].max() == 0


@torch.no_grad()
def test_shares_depend_on_what_the_head_covers_nearby(learned):
    layers, shares, cover = drawn(4)
    changed = cover.clone()
    changed[..., :2, :2] = 1 - changed[..., :2, :2]
    off = (learned(layers, shares, changed) - learned(layers, shares, cover)).abs()
    assert off[..., :2, :2].max() > 1e-3 and off[..., 10:, 10:].max() == 0


@torch.no_grad()
def test_frames_are_blended_alone(learned):
    parts = drawn(3)
    torch.testing.assert_close(learned(*(part[1:] for part in parts)), learned(*parts)[1:])
    coarse = learned.bfloat16()(*parts)
    assert coarse.dtype == torch.float32 and (coarse - learned.float()(*parts)).abs().max() < 0.1
