"""What a canvas holds, and where."""

from __future__ import annotations

import torch

from stages.canvas import ShownPortrait, canvases
from stages.keypoints import draw
from stages.moved import moved


def keypoints(seed: int, num_frames: int) -> torch.Tensor:
    return torch.randn(num_frames, 9, 3, generator=torch.Generator().manual_seed(seed)) * 0.3


def tokens(seed: int, num_frames: int) -> torch.Tensor:
    return torch.randn(num_frames, 5, 6, generator=torch.Generator().manual_seed(seed))


def shown(seed: int) -> ShownPortrait:
    return ShownPortrait(torch.rand(3, 48, 48), keypoints(seed, 1)[0], tokens(seed, 1)[0])


def test_the_official_canvas_is_the_drawn_keypoints(config):
    points = keypoints(1, 2)
    assert torch.equal(canvases(points, tokens(1, 2), None, None, config), draw(points, 48, config.keypoints))


def test_a_canvas_can_also_hold_the_moved_and_the_unmoved_portrait(showing_stages):
    config, points, portrait = showing_stages.config, keypoints(1, 2), shown(2)
    seen = canvases(points, tokens(1, 2), portrait, None, config)
    assert seen.shape == (2, 9, 48, 48)
    assert torch.equal(seen[:, :3], draw(points, 48, config.keypoints))
    turned = moved(portrait.picture, portrait.keypoints, points, config.pose_guider.head)
    assert torch.equal(seen[:, 3:6], turned)
    assert torch.equal(seen[:, 6:], portrait.picture.expand(2, -1, -1, -1))
    assert seen.min() >= 0 and seen.max() <= 1


def test_at_the_portraits_own_pose_both_pictures_are_the_same(showing_stages):
    portrait = shown(2)
    [seen] = canvases(portrait.keypoints[None], portrait.tokens[None], portrait, None, showing_stages.config)
    torch.testing.assert_close(seen[3:6], seen[6:], rtol=0, atol=1e-3)


@torch.no_grad()
def test_where_there_is_a_network_it_moves_the_portrait(moving_stages):
    config, points, told, portrait = moving_stages.config, keypoints(1, 2), tokens(1, 2), shown(2)
    mover = moving_stages.denoise.pose_guider.mover
    seen = canvases(points, told, portrait, mover, config)
    drawn = draw(points, 48, config.keypoints)
    looked = mover.look(portrait.picture, portrait.keypoints, portrait.tokens).half()
    turned = mover(drawn, portrait.picture, portrait.keypoints, points, portrait.tokens, told, looked)
    assert torch.equal(seen[:, 3:6], turned.half().float())
