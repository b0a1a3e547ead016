"""The pose guider's sizes and receptive field."""

import torch

from stages.config import PoseGuiderConfig
from stages.networks.pose_guider import PoseGuider


@torch.no_grad()
def test_each_step_halves_the_canvas_and_frames_stay_apart():
    torch.manual_seed(0)
    guider = PoseGuider(PoseGuiderConfig(channels=(3, 5, 7)), out_channels=11).eval()
    canvases = torch.rand(2, 3, 24, 16)
    features = guider(canvases)
    assert features.shape == (2, 11, 6, 4)
    torch.testing.assert_close(features[1:], guider(canvases[1:]))


@torch.no_grad()
def test_a_point_only_changes_the_features_around_it():
    torch.manual_seed(0)
    guider = PoseGuider(PoseGuiderConfig(channels=(3, 5)), out_channels=4).eval()
    canvas = torch.zeros(1, 3, 64, 64)
    drawn = canvas.clone()
    drawn[:, :, 8:12, 8:12] = 1
    changed = (guider(drawn) != guider(canvas)).any(dim=1)[0]
    assert changed[:10, :10].any()
    assert not changed[12:].any()
    assert not changed[:, 12:].any()
