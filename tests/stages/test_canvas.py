"""What a canvas holds, and where."""

from __future__ import annotations

import torch

from stages.canvas import canvases
from stages.keypoints import draw
from stages.moved import moved


def keypoints(seed: int, num_frames: int) -> torch.Tensor:
    return torch.randn(num_frames, 9, 3, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_the_official_canvas_is_the_drawn_keypoints(config):
    points = keypoints(1, 2)
    assert torch.equal(canvases(points, None, None, config), draw(points, 48, config.keypoints))


def test_a_canvas_can_also_hold_the_moved_and_the_unmoved_portrait(showing_stages):
    config, points, [own], portrait = showing_stages.config, keypoints(1, 2), keypoints(2, 1), torch.rand(3, 48, 48)
    seen = canvases(points, portrait, own, config)
    assert seen.shape == (2, 9, 48, 48)
    assert torch.equal(seen[:, :3], draw(points, 48, config.keypoints))
    assert torch.equal(seen[:, 3:6], moved(portrait, own, points, config.pose_guider.head))
    assert torch.equal(seen[:, 6:], portrait.expand(2, -1, -1, -1))
    assert seen.min() >= 0 and seen.max() <= 1


def test_at_the_portraits_own_pose_both_pictures_are_the_same(showing_stages):
    own, portrait = keypoints(2, 1), torch.rand(3, 48, 48)
    [seen] = canvases(own, portrait, own[0], showing_stages.config)
    torch.testing.assert_close(seen[3:6], seen[6:], rtol=0, atol=1e-3)
