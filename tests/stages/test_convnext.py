"""The norms of a ConvNeXt V2 against torch's and against numbers by hand."""

import pytest
import torch
from einops import rearrange

from stages.networks.convnext import ChannelNorm, ResponseNorm


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


@torch.no_grad()
def test_response_norm_in_bfloat16_is_that_of_fp32_rounded():
    norm = ResponseNorm(6)
    norm.gamma.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = norm.bfloat16()(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), norm.float()(x.float()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_silent_channel_leaves_gradients_finite(dtype):
    x = torch.randn(2, 3, 3, 4, dtype=dtype)
    x[..., 1] = 0
    x.requires_grad_()
    ResponseNorm(4).to(dtype)(x).sum().backward()
    assert x.grad.isfinite().all()
