"""The pose guider's sizes and receptive field."""

import pytest
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
@pytest.mark.parametrize(("shows_portrait", "num_channels"), [(False, 3), (True, 9)])
def test_a_guider_that_folds_squares_has_one_convolution_less_at_the_same_size(shows_portrait, num_channels):
    config = PoseGuiderConfig(channels=(3, 5), pixel_patch=4, shows_portrait=shows_portrait)
    guider = PoseGuider(config, out_channels=11).eval()
    assert guider.conv_in.weight.shape == (3, num_channels * 16, 3, 3)
    assert config.downscale == 8
    assert guider(torch.rand(2, num_channels, 24, 16)).shape == (2, 11, 3, 2)


def test_folding_changes_no_tensors_name():
    plain, folding = (PoseGuider(PoseGuiderConfig(channels=(3, 5), pixel_patch=patch), 4) for patch in (1, 2))
    assert plain.state_dict().keys() == folding.state_dict().keys()


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
