"""Depths of a portrait's head: what they start as, and what they depend on."""

from __future__ import annotations

import copy

import pytest
import torch
from einops import rearrange

from stages.config import HeadConfig
from stages.moved import spread
from stages.networks.depths import FINER, MAX_ASIDE, Depths, ellipsoid, facing
from stages.surface import directions
from training.recipes import smoke_model

SIDE = 48
KEYPOINTS = torch.tensor([[-0.2, -0.1, 0.1], [0.2, -0.1, 0.1], [0.0, 0.3, -0.2], *[[0.0, 0.0, 0.0]] * 6])


@pytest.fixture(scope="module")
def depths(moving_stages) -> Depths:
    return moving_stages.denoise.pose_guider.mover.depths


@torch.no_grad()
def test_untrained_depths_are_an_ellipsoid_of_which_nothing_is_known():
    config = smoke_model()
    fresh, points = Depths(config), torch.randn(2, config.keypoints.num_keypoints, 3) * 0.3
    depth, is_head, *aside, thickness = fresh(torch.rand(2, 3, 64, 64), points).unbind(1)
    middle = rearrange(spread(points) * config.pose_guider.head.centre[2], "n -> n 1 1")
    torch.testing.assert_close(depth + thickness - middle, middle - depth)
    torch.testing.assert_close(depth, ellipsoid(points, 16 * FINER, config.pose_guider.head)[:, 0])
    assert not (is_head > 0).any()
    faced = torch.stack([directions(one) for one in depth])
    torch.testing.assert_close(torch.stack(aside, -1), faced[..., :2], rtol=0, atol=0.02)


def test_nothing_faces_aside_by_more_than_a_unit_normal_can():
    depth, aside = torch.zeros(1, 8, 8), torch.zeros(1, 2, 8, 8)
    aside[:, 0, 3, 3], aside[:, 1, 3, 4] = 5.0, -0.5
    faced = facing(depth, aside)[0, :, 3, 3:5]
    torch.testing.assert_close(faced, torch.tensor([[MAX_ASIDE, 0.0], [0.0, -0.5]]))


def test_an_ellipsoid_is_nearest_in_its_middle_and_as_deep_as_its_outline_around_it():
    head = HeadConfig(centre=(0.0, 0.0, 0.0), radii=(1.0, 1.0, 2.0))
    [[depth]] = ellipsoid(KEYPOINTS[None], 41, head)
    away = KEYPOINTS - KEYPOINTS.mean(0)
    unit = away.square().sum(1).mean().sqrt()
    x, y = ((KEYPOINTS.mean(0)[:2] + 1) * 41 / 2).long().tolist()
    assert depth.argmin() == y * 41 + x
    torch.testing.assert_close(depth.min(), -2 * unit, rtol=0.02, atol=0)
    assert depth[0, 0] == 0


@torch.no_grad()
def test_picture_and_keypoints_decide_and_portraits_do_not_see_each_other(depths):
    pictures, points = torch.rand(2, 3, SIDE, SIDE), torch.stack([KEYPOINTS, KEYPOINTS + 0.1])
    both = depths(pictures, points)
    assert both.shape == (2, 5, 12 * FINER, 12 * FINER)
    torch.testing.assert_close(both[1:], depths(pictures[1:], points[1:]), rtol=0, atol=1e-4)
    for changed in (depths(pictures.flip(0), points), depths(pictures, points.flip(0))):
        assert (changed - both).abs().max() > 1e-3


@torch.no_grad()
def test_weights_in_bfloat16_do_not_make_depths_coarse(depths):
    picture = torch.rand(1, 3, SIDE, SIDE)
    exact, ours = (part(picture, KEYPOINTS[None])[:, 0] for part in (depths, copy.deepcopy(depths).bfloat16()))
    further = exact - ellipsoid(KEYPOINTS[None], 12 * FINER, depths.head)[:, 0]
    assert (ours - exact).abs().max() < 0.1 * further.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("keypoints", [torch.zeros(1, 9, 3), torch.full((1, 9, 3), 100.0)])
def test_keypoints_without_size_or_off_the_picture_give_depths(depths, keypoints):
    assert depths(torch.rand(1, 3, SIDE, SIDE), keypoints).half().isfinite().all()
