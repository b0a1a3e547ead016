"""The keypoint extractor's shapes, and its norms against torch's."""

from dataclasses import replace

import torch
from einops import rearrange

from stages.config import KeypointConfig
from stages.networks.keypoint_extractor import ChannelNorm, KeypointExtractor, ResponseNorm

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
def test_channel_norm_is_a_layer_norm_over_channels():
    torch.manual_seed(0)
    norm = ChannelNorm(6)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.uniform_(-1, 1)
    x = torch.randn(2, 6, 3, 4)
    expected = torch.nn.functional.layer_norm(rearrange(x, "n c h w -> n h w c"), (6,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(norm(x), rearrange(expected, "n h w c -> n c h w"))


@torch.no_grad()
def test_channel_norm_computes_in_fp32_whatever_the_input():
    x = (torch.randn(1, 6, 3, 4) + 30).bfloat16()
    normed = ChannelNorm(6)(x)
    assert normed.dtype == torch.bfloat16
    assert torch.equal(normed, ChannelNorm(6)(x.float()).bfloat16())


@torch.no_grad()
def test_response_norm_favours_the_strong_channel_and_starts_as_identity():
    x = torch.ones(1, 4, 4, 2)
    x[..., 1] = 3
    norm = ResponseNorm(2)
    assert torch.equal(norm(x), x)
    norm.gamma.fill_(1)
    # Norms over the 16 pixels are 4 and 12, their mean 8: x · (4/8 + 1) and x · (12/8 + 1).
    torch.testing.assert_close(norm(x)[0, 0, 0], torch.tensor([1.5, 7.5]))
