"""The keypoint extractor's shapes, and what its parts do."""

import copy
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from stages.config import KeypointConfig
from stages.keypoints import pose_from_raw
from stages.networks.keypoint_extractor import KeypointExtractor

SMALL = KeypointConfig(
    image_px=64,
    depths=(1, 2, 1),
    dims=(6, 8, 10),
    num_keypoints=5,
    num_angle_bins=9,
    drawn=(0, 4),
    colours=((9, 0, 0),) * 2,
)


@torch.no_grad()
def test_every_head_has_the_configured_size():
    torch.manual_seed(0)
    raw = KeypointExtractor(SMALL).eval()(torch.rand(2, 3, 64, 64))
    assert raw.keypoints.shape == (2, 15)
    assert raw.pitch.shape == raw.yaw.shape == raw.roll.shape == (2, 9)
    assert raw.translation.shape == (2, 3)
    assert raw.scale.shape == (2, 1)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_influence_each_other():
    torch.manual_seed(0)
    extractor = KeypointExtractor(SMALL).eval()
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(extractor(images).keypoints[1:2], extractor(images[1:2]).keypoints)


@torch.no_grad()
def test_gathered_cells_each_have_weights_and_equal_ones_are_the_mean():
    torch.manual_seed(0)
    plain = KeypointExtractor(SMALL).eval()
    gathering = KeypointExtractor(replace(SMALL, gathered_cells=4)).eval()
    gathering.load_state_dict(plain.state_dict(), strict=False)
    gathering.gather.weight.copy_(torch.eye(10)[:, :, None, None] / 16)
    gathering.gather.bias.zero_()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(gathering(images).keypoints, plain(images).keypoints, rtol=0, atol=1e-5)
    gathering.gather.weight[:5, :, 1, 2] += 0.1
    assert (gathering(images).keypoints - plain(images).keypoints).abs().max() > 1e-3


@torch.no_grad()
def test_an_extractor_that_pinpoints_begins_as_one_that_sees_half_the_side():
    torch.manual_seed(0)
    plain = KeypointExtractor(SMALL).eval()
    fine = KeypointExtractor(replace(SMALL, image_px=128, fine_channels=4)).eval()
    fine.load_state_dict(plain.state_dict(), strict=False)
    images = torch.rand(2, 3, 64, 64)
    doubled = F.interpolate(images, scale_factor=2.0)
    raw = fine(doubled)
    assert raw.heat is not None and raw.heat.shape == (2, 5, 32, 32) and plain(images).heat is None
    torch.testing.assert_close(raw.pitch, plain(images).pitch)
    fine.pinpoint.read[-1].weight.normal_()
    assert (fine(doubled).pitch - raw.pitch).abs().max() > 1e-3


@torch.no_grad()
def test_a_trunk_in_bfloat16_hardly_turns_a_head():
    torch.manual_seed(0)
    looking_again = {"upright_channels": (4, 6), "upright_depths": (1, 0), "upright_px": 16}
    exact = KeypointExtractor(replace(SMALL, image_px=128, fine_channels=4, gathered_cells=4, **looking_again)).eval()
    exact.pinpoint.read[-1].weight.normal_(std=0.1)
    rounded = copy.deepcopy(exact)
    for part in rounded.trunk():
        part.bfloat16()
    images = torch.rand(6, 3, 128, 128)
    raw = rounded(images)
    assert raw.pitch.dtype == raw.heat.dtype == torch.float32
    degrees, ours = pose_from_raw(exact(images)).degrees, pose_from_raw(raw).degrees
    assert not np.array_equal(ours, degrees)
    assert np.abs(ours - degrees).max() < 0.1
