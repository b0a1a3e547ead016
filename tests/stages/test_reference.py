import numpy as np
import pytest
import torch
from PIL import Image

from stages.images import clip_pixels, portrait_tensor
from stages.messages import Keyframe
from stages.reference import ReferenceStage


@pytest.fixture
def reference(stages) -> ReferenceStage:
    return stages.reference


def test_a_portrait_becomes_features_a_token_and_a_latent(reference, draw_picture):
    portrait = reference.open(draw_picture(1))
    shapes = [(36, 8), (9, 16), (4, 24), (9, 16), (9, 16), (36, 8), (36, 8)]
    assert [layer.shape for layer in portrait.features.layers] == shapes
    assert {layer.dtype for layer in portrait.features.layers} == {np.dtype(np.float16)}
    assert (portrait.token.shape, portrait.token.dtype) == ((10,), np.float32)
    assert (portrait.latent.shape, portrait.latent.dtype) == ((12, 6, 6), np.float32)


def test_features_are_the_reference_unets_rounded_to_fp16(reference, draw_picture):
    picture = draw_picture(1)
    token = reference.image_encoder(clip_pixels(picture, 28))[0]
    latent = reference.vae.encode(portrait_tensor(picture, 48))
    portrait = reference.open(picture)
    np.testing.assert_allclose(portrait.token, token.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(portrait.latent, latent[0].numpy(), rtol=0, atol=1e-5)
    exact = reference.reference_unet(latent, token)
    for layer, features in zip(portrait.features.layers, exact, strict=True):
        # Half a unit in the last of fp16's eleven places, and some rounding in fp32.
        np.testing.assert_allclose(layer.astype(np.float32), features.numpy(), rtol=2**-11, atol=1e-5)


def test_pixels_go_along_only_where_canvases_show_them(reference, showing_stages, draw_picture):
    assert reference.open(draw_picture(1)).pixels is None
    picture = draw_picture(1, 90, 70)
    pixels = showing_stages.reference.open(picture).pixels
    assert np.array_equal(pixels, Image.fromarray(picture).resize((48, 48), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("side", [31, 48, 90])
def test_portraits_of_any_size_are_taken(reference, draw_picture, side):
    assert reference.open(draw_picture(1, side)).latent.shape == (12, 6, 6)


def test_a_keyframe_with_the_portraits_latent_has_the_portraits_features(reference, draw_picture):
    portrait = reference.open(draw_picture(1))
    features = reference.keyframe(Keyframe(portrait.latent, portrait.token))
    for ours, theirs in zip(features.layers, portrait.features.layers, strict=True):
        assert ours.dtype == np.float16
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=2e-3, atol=1e-5)


def test_latent_and_token_both_show_in_a_keyframes_features(reference, draw_picture):
    portrait, other = (reference.open(draw_picture(seed)) for seed in (1, 2))
    base = reference.keyframe(Keyframe(portrait.latent, portrait.token))
    for keyframe in (Keyframe(other.latent, portrait.token), Keyframe(portrait.latent, other.token)):
        changed = reference.keyframe(keyframe)
        # The first features come before any attention to the token.
        assert np.abs(changed.layers[-1].astype(np.float32) - base.layers[-1]).max() > 1e-3


def test_a_portrait_is_encoded_alike_every_time(reference, draw_picture):
    first = reference.open(draw_picture(1))
    reference.open(draw_picture(2))
    again = reference.open(draw_picture(1))
    assert np.array_equal(first.latent, again.latent)
    assert all(np.array_equal(*pair) for pair in zip(first.features.layers, again.features.layers, strict=True))


def test_what_is_sent_is_no_tensor_and_holds_no_graph(reference, draw_picture):
    portrait = reference.open(draw_picture(1))
    arrays = [*portrait.features.layers, portrait.token, portrait.latent]
    assert not any(isinstance(array, torch.Tensor) for array in arrays)
    assert all(array.flags.c_contiguous for array in arrays)
