"""The moved portrait against drawn people whose true pose is known, and against keypoints that make no sense."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.config import HeadConfig
from stages.keypoints import rotation
from stages.moved import moved, relative_turn
from training.identity import Identity, sample_identity
from training.motion import Motion, sample_motion
from training.world import project, render, true_pose

SIDE_PX = 96


def picture(identity: Identity, motion: Motion) -> Tensor:
    return torch.from_numpy(render(identity, motion, SIDE_PX)).permute(2, 0, 1) / 255


def points(identity: Identity, motion: Motion) -> Tensor:
    return torch.from_numpy(project(true_pose(identity, motion)))[0]


def psnr_db(ours: Tensor, truth: Tensor) -> float:
    return -10 * torch.log10((ours - truth).square().mean()).item()


def face(image: Tensor, keypoints: Tensor) -> Tensor:
    """A square around the keypoints' mean, a fifth of the picture to each side."""
    x, y = ((keypoints.mean(0)[:2] / 2 + 0.5) * SIDE_PX).int().tolist()
    reach = SIDE_PX // 5
    return image[:, max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach]


def some_points(seed: int, num_points: int = 9) -> Tensor:
    return torch.randn(num_points, 3, generator=torch.Generator().manual_seed(seed)) * 0.3


def noise(seed: int, side: int = 40) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))


def test_a_moved_portrait_is_nearer_to_the_true_picture_than_the_unmoved_one():
    gains_db, face_gains_db = [], []
    for seed in range(8):
        identity, random = sample_identity(500 + seed), np.random.default_rng(seed)
        before, after = sample_motion(random, 0.3), sample_motion(random)
        portrait, truth = picture(identity, before), picture(identity, after)
        start, end = points(identity, before), points(identity, after)
        [ours] = moved(portrait, start, end[None], HeadConfig())
        gains_db.append(psnr_db(ours, truth) - psnr_db(portrait, truth))
        ours, portrait, truth = (face(image, end) for image in (ours, portrait, truth))
        face_gains_db.append(psnr_db(ours, truth) - psnr_db(portrait, truth))
    assert np.mean(gains_db) > 1
    assert np.mean(face_gains_db) > 2.5


def test_with_its_own_keypoints_the_portrait_stays_as_it_is():
    portrait, start = noise(1), some_points(2)
    own = moved(portrait, start, start.expand(2, -1, -1), HeadConfig())
    torch.testing.assert_close(own, portrait.expand(2, -1, -1, -1), rtol=0, atol=1e-3)


def test_each_frame_is_moved_by_its_own_keypoints():
    portrait, start, ends = noise(1), some_points(2), torch.stack([some_points(3), some_points(4)])
    together = moved(portrait, start, ends, HeadConfig())
    for one, end in zip(together, ends, strict=True):
        torch.testing.assert_close(one, moved(portrait, start, end[None], HeadConfig())[0], rtol=0, atol=1e-5)


def test_far_from_the_head_nothing_moves():
    portrait, start = noise(1), some_points(2) * 0.3
    [ours] = moved(portrait, start, start[None] + torch.tensor([0.2, 0.0, 0.0]), HeadConfig())
    torch.testing.assert_close(ours[:, :, :3], portrait[:, :, :3], rtol=0, atol=1e-3)
    assert (ours - portrait)[:, 18:22, 22:26].abs().max() > 0.1


def test_turn_and_scale_are_found_again():
    start = some_points(5)
    turns = rotation(torch.tensor([[10.0, -40.0, 5.0], [0.0, 25.0, 90.0]])).transpose(1, 2)
    scales = torch.tensor([0.7, 1.5])
    ends = scales[:, None, None] * torch.einsum("nij,kj->nki", turns, start) + torch.tensor([0.3, -0.2, 0.1])
    turn, scale = relative_turn(start, ends)
    torch.testing.assert_close(turn, turns, rtol=0, atol=1e-5)
    torch.testing.assert_close(scale, scales, rtol=0, atol=1e-5)


def test_a_mirrored_face_is_turned_and_not_mirrored():
    start = some_points(5)
    turn, _ = relative_turn(start, (start * torch.tensor([-1.0, 1.0, 1.0]))[None])
    assert torch.linalg.det(turn)[0].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (torch.zeros(9, 3), torch.zeros(9, 3)),
        (some_points(1), torch.full((9, 3), 0.4)),
        (torch.full((9, 3), 0.4), some_points(1)),
        (some_points(1), some_points(1) + 7),
        (some_points(1), some_points(2) * 1e30),
        (some_points(1) * 1e-20, some_points(2)),
        (some_points(1) * torch.tensor([1.0, 0.0, 0.0]), some_points(2) * torch.tensor([0.0, 1.0, 0.0])),
        (some_points(1), torch.full((9, 3), torch.nan)),
        (some_points(1), torch.full((9, 3), torch.inf)),
    ],
    ids=["nothing", "to a point", "from a point", "off", "huge", "minute", "lines", "nan", "inf"],
)
@pytest.mark.parametrize("side", [3, 41])
def test_any_keypoints_give_a_picture(start, end, side):
    portrait = noise(1, side)
    [ours] = moved(portrait, start, end[None], HeadConfig())
    assert ours.shape == portrait.shape
    assert ours.isfinite().all() and ours.min() >= 0 and ours.max() <= 1
