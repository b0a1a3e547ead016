"""The VAE against diffusers' AutoencoderKL, and its folding."""

import pytest
import torch

from stages.config import VaeConfig
from stages.networks.vae import Vae, fold, unfold

PLAIN = VaeConfig(block_channels=(8, 12, 20), layers_per_block=2, latent_channels=3, num_norm_groups=4)


def build(config: VaeConfig, seed: int = 0) -> Vae:
    torch.manual_seed(seed)
    return Vae(config).eval()


@torch.no_grad()
def test_equals_diffusers_with_the_same_weights():
    from diffusers import AutoencoderKL

    twin = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=PLAIN.block_channels,
        layers_per_block=PLAIN.layers_per_block,
        latent_channels=PLAIN.latent_channels,
        norm_num_groups=PLAIN.num_norm_groups,
        scaling_factor=PLAIN.scaling_factor,
    ).eval()
    vae = build(PLAIN)
    twin.load_state_dict(vae.state_dict(), strict=True)
    images = torch.rand(2, 3, 24, 16) * 2 - 1
    expected = twin.encode(images).latent_dist
    mean, logvar = vae.moments(images)
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=1e-5)
    latents = vae.encode(images)
    torch.testing.assert_close(latents, expected.mean * 0.18215, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(latents), twin.decode(expected.mean).sample, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_coding_takes_from_pictures_is_said_in_full_precision(dtype):
    vae, images = build(PLAIN).to(dtype), torch.rand(2, 3, 24, 16) * 2 - 1
    lost = vae.lost(images)
    coded = vae.decode(vae.encode(images.to(dtype))).float()
    assert lost.dtype == torch.float32
    torch.testing.assert_close(coded + lost, images, rtol=0, atol=1e-6)


@torch.no_grad()
def test_patches_shrink_the_picture_and_widen_the_latent():
    config = VaeConfig(
        block_channels=(8, 12),
        layers_per_block=1,
        latent_channels=3,
        num_norm_groups=4,
        mid_attention=False,
        pixel_patch=4,
        latent_patch=2,
    )
    vae = build(config)
    assert not any("attentions" in name for name in vae.state_dict())
    latents = vae.encode(torch.rand(2, 3, 48, 32))
    assert config.downscale == 16
    assert latents.shape == (2, 12, 3, 2)
    assert vae.decode(latents).shape == (2, 3, 48, 32)


def test_folding_keeps_each_square_together_and_is_undone_exactly():
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    folded = fold(x, 2)
    assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(unfold(folded, 2), x)


@torch.no_grad()
def test_latent_patch_only_rearranges_what_the_plain_model_encodes():
    plain, patched = build(PLAIN), build(VaeConfig(**{**vars(PLAIN), "latent_patch": 2}))
    images = torch.rand(1, 3, 16, 24)
    assert torch.equal(patched.encode(images), fold(plain.encode(images), 2))
    torch.testing.assert_close(patched.decode(patched.encode(images)), plain.decode(plain.encode(images)))


@pytest.mark.parametrize("side", [18, 20])
def test_a_picture_side_that_patches_do_not_divide_is_refused(side: int):
    with pytest.raises(Exception, match="divide"):
        build(VaeConfig(block_channels=(8,), num_norm_groups=4, pixel_patch=8, mid_attention=False)).encode(
            torch.zeros(1, 3, side, side)
        )
