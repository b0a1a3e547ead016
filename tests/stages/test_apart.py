"""A portrait taken apart: what is known stays as it is, what is hidden is filled from around."""

from __future__ import annotations

import pytest
import torch

from stages.apart import BESIDE_MARGIN_PX, HEAD_MARGIN_PX, filled, taken_apart


def disc(side: int, radius: float) -> torch.Tensor:
    """(side, side) bool."""
    line = torch.arange(side) + 0.5 - side / 2
    return line[:, None] ** 2 + line**2 < radius**2


@pytest.mark.parametrize("side", [64, 52])
def test_a_red_head_before_a_blue_wall_leaves_two_plain_pictures(side):
    is_head = disc(side, 14)
    red, blue = torch.tensor([0.9, 0.1, 0.0]), torch.tensor([0.0, 0.2, 0.8])
    portrait = torch.where(is_head, red[:, None, None], blue[:, None, None])
    head, behind = taken_apart(portrait, 5.0 * disc(side // 2, 7) - 2.5)
    torch.testing.assert_close(head, red[:, None, None].expand_as(head), rtol=0, atol=1e-5)
    torch.testing.assert_close(behind, blue[:, None, None].expand_as(head), rtol=0, atol=1e-5)


def test_what_is_away_from_the_outline_is_left_as_it_is():
    portrait, is_head = torch.rand(3, 64, 64), disc(64, 14)
    head, behind = taken_apart(portrait, 5.0 * is_head - 2.5)
    within, around = disc(64, 14 - 2 * HEAD_MARGIN_PX - 1), ~disc(64, 14 + 2 * BESIDE_MARGIN_PX + 1)
    assert torch.equal(head[:, within], portrait[:, within])
    assert torch.equal(behind[:, around], portrait[:, around])
    assert not torch.equal(behind[:, within], portrait[:, within])


def test_a_ramp_goes_on_behind_the_head():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    known = (~disc(64, 12)).float()[None, None]
    assert (filled(ramp, known) - ramp).abs().max() < 0.12
    assert (ramp.mean() - ramp)[..., disc(64, 12)].abs().max() > 0.15


def test_where_nothing_or_everything_is_known_pictures_are_as_they_were():
    pictures = torch.rand(2, 3, 20, 20)
    known = torch.stack([torch.zeros(1, 20, 20), torch.ones(1, 20, 20)])
    assert torch.equal(filled(pictures, known), pictures)
    nobody = taken_apart(pictures[0], torch.full((10, 10), -2.0))
    assert torch.equal(nobody, pictures[:1].expand(2, -1, -1, -1))
