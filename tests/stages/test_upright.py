"""The second look: squares that hold a head upright wherever it is, and angles that are read from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange

from stages.config import KeypointConfig
from stages.keypoints import pose_from_raw
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.networks.upright import REACH, Upright, upright
from training.identity import sample_identity
from training.motion import Motion
from training.world import render

CONFIG = KeypointConfig(
    image_px=64, depths=(1, 2, 1), dims=(6, 8, 10), num_keypoints=5, num_angle_bins=9, drawn=(0, 4),
    colours=((9, 0, 0),) * 2, upright_channels=(4, 6, 8), upright_depths=(0, 2, 1), upright_px=40,
)  # fmt: skip


def drawn(motion: Motion) -> torch.Tensor:
    picture = render(sample_identity(3), motion, 192)
    return rearrange(torch.from_numpy(picture), "h w c -> 1 c h w").float() / 127.5 - 1


def square_of(motion: Motion) -> torch.Tensor:
    numbers = [torch.tensor([number]) for number in (motion.scale, motion.roll)]
    return upright(drawn(motion), torch.tensor([[motion.x, motion.y]]), *numbers, 64)


def test_a_head_looks_the_same_wherever_it_is_however_large_and_rolled():
    straight = Motion(pitch=5.0, yaw=-12.0, scale=0.5)
    elsewhere = replace(straight, roll=17.0, x=0.15, y=-0.1, scale=0.42)
    line = torch.linspace(-1, 1, 64)
    head = torch.hypot(line[None], line[:, None]) < 0.6
    seen, again, aside = (
        square_of(motion)[0][:, head] for motion in (straight, elsewhere, replace(elsewhere, yaw=12.0))
    )
    assert (again - seen).abs().mean() < 0.5 * (aside - seen).abs().mean()


def test_a_square_reaches_as_far_as_said():
    ramp = torch.linspace(-1, 1, 257)[:-1].add(1 / 256).expand(1, 3, 256, 256)
    seen = upright(ramp, torch.tensor([[0.1, 0.0]]), torch.tensor([0.4]), torch.tensor([0.0]), 50)
    torch.testing.assert_close(seen[0, 0, 7, [0, -1]], 0.1 + 0.4 * REACH * torch.tensor([-0.98, 0.98]))
    rolled = upright(ramp, torch.tensor([[0.1, 0.0]]), torch.tensor([0.4]), torch.tensor([90.0]), 50)
    torch.testing.assert_close(rolled[0, 0, [0, -1], 7], 0.1 - 0.4 * REACH * torch.tensor([-0.98, 0.98]))


@torch.no_grad()
def test_what_the_second_look_says_counts_and_roll_is_off_that_of_the_square():
    torch.manual_seed(0)
    extractor, images = KeypointExtractor(CONFIG).eval(), torch.rand(2, 3, 64, 64)
    assert extractor.upright is not None
    extractor.upright.out.weight.zero_()
    extractor.upright.out.bias.copy_(torch.tensor([0.5, -1.0, 0.25]))
    raw = extractor(images)
    plain = pose_from_raw(replace(raw, turn=None)).degrees
    expected = np.stack([np.full(2, 5.0), np.full(2, -15.0), plain[:, 2] + 0.5], 1)
    np.testing.assert_allclose(pose_from_raw(raw).degrees, expected, atol=1e-4)


@torch.no_grad()
def test_pictures_do_not_see_each_other_in_their_squares():
    torch.manual_seed(0)
    network, squares = Upright(CONFIG).eval(), torch.rand(3, 3, 40, 40)
    torch.testing.assert_close(network(squares)[1:2], network(squares[1:2]), rtol=0, atol=1e-4)


def test_squares_are_the_same_in_mixed_precision():
    place = torch.rand(2, 2), torch.tensor([0.51, 0.43]), torch.tensor([7.3, -2.1])
    images = torch.rand(2, 3, 64, 64)
    exact = upright(images, *place, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upright(images, *place, 40), exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -3.0, 1e30])
def test_senseless_places_give_a_square(value):
    odd = torch.tensor([value])
    assert upright(torch.rand(1, 3, 64, 64), odd.expand(1, 2), odd, odd, 40).isfinite().all()
