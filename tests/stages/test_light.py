"""Light: what a look at a portrait depends on, and what it does to a head that turns in it."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from stages.moved import cells
from stages.networks.light import LIGHT_CELLS, MAX_BRIGHTENING, MAX_BRIGHTNESS, Light, brightened
from training.identity import sample_identity
from training.motion import sample_portrait_motion
from training.places import HEAD, head_shape, light_map, sources
from training.recipes import smoke_model
from training.world import render

SIDE = 64
KEYPOINTS = torch.tensor([[-0.2, -0.1, 0.1], [0.2, -0.1, 0.1], [0.0, 0.3, -0.2], *[[0.0, 0.0, 0.0]] * 6])


@pytest.fixture(scope="module")
def light(moving_stages) -> Light:
    return moving_stages.denoise.pose_guider.mover.light


def facing(x: float, y: float) -> torch.Tensor:
    """(3,) a unit normal, z < 0 towards the viewer."""
    return torch.tensor([x, y, -((1 - x * x - y * y) ** 0.5)])


def errors(seed: int) -> tuple[float, float]:
    """Mean absolute error of a drawn head that turns, looked up in its portrait: in the portrait's light, and lit."""
    person, rest = sample_identity(650 + seed), sample_portrait_motion(np.random.default_rng(seed))
    motion = dataclasses.replace(rest, yaw=rest.yaw + 25, pitch=rest.pitch - 10)
    shift, kinds, _ = sources(person, rest, motion, SIDE)
    places = (cells(SIDE, torch.zeros(1)) + torch.from_numpy(shift))[None]
    normals = [torch.from_numpy(head_shape(person, one, SIDE)[2]) for one in (rest, motion)]
    before, after = (rearrange(part, "h w c -> 1 c h w") for part in normals)
    before = F.grid_sample(before, places, align_corners=False)
    true, _ = light_map(person, LIGHT_CELLS)
    gain = brightened(rearrange(torch.from_numpy(true), "h w c -> c h w"), torch.cat([before, after], 1)).exp()
    portrait, frame = (
        rearrange(torch.from_numpy(render(person, one, SIDE, 2.0)), "h w c -> 1 c h w").float() / 255
        for one in (rest, motion)
    )
    shown = F.grid_sample(portrait, places, align_corners=False)
    inner = torch.from_numpy(kinds == HEAD) & (before[0, 2] < -0.5) & (after[0, 2] < -0.5)
    unlit, lit = (float((part - frame).abs().mean(1)[0][inner].mean()) for part in (shown, shown * gain))
    return unlit, lit


def test_true_light_explains_how_drawn_heads_change_as_they_turn():
    unlit, lit = np.mean([errors(seed) for seed in range(8)], 0)
    assert lit < 0.8 * unlit


def test_what_does_not_turn_stays_as_bright_and_what_turns_to_the_light_brightens():
    line = torch.linspace(-1, 1, LIGHT_CELLS)
    from_the_right = line.expand(3, LIGHT_CELLS, LIGHT_CELLS)
    still, turns = (
        torch.cat([facing(0.0, 0.0), after])[None, :, None, None] for after in (facing(0.0, 0.0), facing(0.5, 0.1))
    )
    assert not brightened(from_the_right, still).any() and not brightened(from_the_right, torch.zeros(1, 6, 1, 1)).any()
    torch.testing.assert_close(brightened(from_the_right, turns)[0, :, 0, 0], torch.full((3,), 0.5), rtol=0, atol=0.05)
    assert brightened(100 * from_the_right, turns).max() == MAX_BRIGHTENING


def test_untrained_light_is_the_same_everywhere():
    config = smoke_model()
    points = torch.randn(2, config.keypoints.num_keypoints, 3) * 0.3
    assert not Light(config)(torch.rand(2, 3, 64, 64), points, torch.rand(2, 4, 32, 32)).any()


@torch.no_grad()
def test_picture_keypoints_and_shape_decide_and_portraits_do_not_see_each_other(light):
    pictures, points, shapes = (
        torch.rand(2, 3, 48, 48),
        torch.stack([KEYPOINTS, KEYPOINTS + 0.1]),
        torch.rand(2, 4, 24, 24),
    )
    both = light(pictures, points, shapes)
    assert both.shape == (2, 3, LIGHT_CELLS, LIGHT_CELLS)
    torch.testing.assert_close(both[1:], light(pictures[1:], points[1:], shapes[1:]), rtol=0, atol=1e-4)
    for changed in (
        (pictures.flip(0), points, shapes),
        (pictures, points.flip(0), shapes),
        (pictures, points, 1 - shapes),
    ):
        assert (light(*changed) - both).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("keypoints", [torch.zeros(1, 9, 3), torch.full((1, 9, 3), 100.0)])
def test_keypoints_without_size_or_off_the_picture_give_light(light, keypoints):
    assert light(torch.rand(1, 3, 48, 48), keypoints, torch.rand(1, 4, 24, 24)).half().isfinite().all()


@torch.no_grad()
def test_weights_that_say_senseless_light_give_light(light):
    loud = copy.deepcopy(light)
    loud.out.weight.mul_(1e6)
    told = loud(torch.rand(1, 3, 48, 48), KEYPOINTS[None], torch.rand(1, 4, 24, 24))
    assert told.half().isfinite().all() and told.abs().max() == MAX_BRIGHTNESS
