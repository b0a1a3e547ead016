"""What expressions can do to one portrait, looked at once."""

from __future__ import annotations

import copy

import pytest
import torch

from stages.networks.expressions import NUM_FIELDS, NUM_TOLD, REACH, SQUARE_CELLS, Expressions, seen_at, square

KEYPOINTS = torch.tensor([[-0.2, -0.1, 0.0], [0.2, -0.1, 0.0], [0.0, 0.3, 0.2], *[[0.0, 0.0, 0.1]] * 6])


@pytest.fixture(scope="module")
def expressions(moving_stages) -> Expressions:
    return moving_stages.denoise.pose_guider.mover.expressions


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 5, 6, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_portraits_own_expression_does_nothing_and_others_do(expressions):
    own, fields = tokens(0), torch.rand(NUM_FIELDS, NUM_TOLD, 4, 4)
    told = expressions.told(fields, own, torch.stack([own, tokens(1)]))
    assert told.shape == (2, NUM_TOLD, 4, 4) and told.dtype == torch.float32
    assert told[0].abs().max() < 1e-4 < 0.1 < told[1].abs().max()


@torch.no_grad()
def test_weights_in_bfloat16_do_not_make_expressions_coarse(expressions):
    rounded = copy.deepcopy(expressions).bfloat16()
    own, near = tokens(0), tokens(0)[None] + 0.01 * tokens(1, 1)
    fields = torch.rand(NUM_FIELDS, NUM_TOLD, 4, 4)
    exact, ours = (part.told(fields, own, torch.cat([own[None], near])) for part in (expressions, rounded))
    assert ours[0].abs().max() < 1e-4
    assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_frames_of_a_call_do_not_see_each_other(expressions):
    fields, own, three = torch.rand(NUM_FIELDS, NUM_TOLD, 4, 4), tokens(0), tokens(2, 3)
    together = expressions.told(fields, own, three)
    torch.testing.assert_close(together[1:2], expressions.told(fields, own, three[1:2]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_face_is_looked_at_wherever_it_is(expressions):
    picture = torch.rand(3, 48, 48)
    fields = expressions.fields(picture, KEYPOINTS, tokens(0))
    assert fields.shape == (NUM_FIELDS, NUM_TOLD, SQUARE_CELLS, SQUARE_CELLS)
    aside = KEYPOINTS + torch.tensor([6 * 2 / 48, 0.0, 0.0])
    elsewhere = expressions.fields(picture.roll(6, dims=2), aside, tokens(0))
    torch.testing.assert_close(fields, elsewhere, rtol=0, atol=1e-3)
    other = expressions.fields(torch.rand(3, 48, 48), KEYPOINTS, tokens(0))
    assert (other - fields).abs().max() > 0.01


def test_what_is_told_lies_in_the_square_and_its_shifts_are_in_half_pictures():
    told = torch.ones(1, NUM_TOLD, 8, 8)
    centre, half = square(KEYPOINTS)
    spread = (KEYPOINTS - KEYPOINTS.mean(0)).square().sum(1).mean().sqrt()
    torch.testing.assert_close(half, REACH * spread)
    places = torch.stack([centre, centre + 0.5 * half, centre + 1.5 * half])[None, None]
    seen = seen_at(told, places, KEYPOINTS)
    torch.testing.assert_close(seen[0, :2, 0, :2], half.expand(2, 2))
    torch.testing.assert_close(seen[0, 2:, 0, :2], torch.ones(NUM_TOLD - 2, 2))
    assert (seen[..., 2] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("keypoints", [torch.zeros(9, 3), torch.full((9, 3), 100.0)])
def test_keypoints_without_size_or_off_the_picture_give_fields(expressions, keypoints):
    assert expressions.fields(torch.rand(3, 48, 48), keypoints, tokens(0)).isfinite().all()
