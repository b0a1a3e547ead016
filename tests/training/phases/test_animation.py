"""A batch as the drawing networks see it: sizes, drops, frozen parts, and nothing of the target in its conditions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from stages.errors import BadConfig
from stages.networks.unet import DenoisingUNet
from training.clips import Batch
from training.layout import BadData
from training.phases.animation import (
    as_half,
    hidden,
    image_loss,
    noisy_motions,
    resampled,
    softness,
    without_temporal,
    without_tokens,
)
from training.phases.phase import draws
from training.recipes import AnimationConfig, smoke_model

NOTHING_DROPPED = {"drop_reference": 0.0, "drop_pose": 0.0, "drop_motion": 0.0, "drop_reference_tokens": 0.0}


def test_a_scene_has_the_sizes_of_the_config(build, batch: Batch):
    scene = build("motion").scene(batch, draws(0, 0, 0, 0))
    assert scene.images.shape == (2, 5, 3, 64, 64)
    assert scene.latents.shape == (2, 5, 24, 8, 8) and scene.portraits.shape == (2, 24, 8, 8)
    assert scene.motion.shape == (2, 5, 5, 12) and scene.pose.shape == (2, 5, 16 + 2 * 24, 8, 8)
    assert scene.weights.shape == (2, 5, 1, 8, 8) and len(scene.memories) == 2


@pytest.mark.parametrize("poses", ["truth", "extractor"])
def test_conditions_come_from_truth_or_from_the_networks(build, batch: Batch, poses: str):
    phase = build("motion", poses=poses, expressions="truth" if poses == "truth" else "encoder", **NOTHING_DROPPED)
    assert torch.isfinite(phase.scene(batch, draws(0, 0, 0, 0)).pose).all()


def test_what_is_dropped_is_gone(build, batch: Batch):
    shares = {"drop_reference": 1.0, "drop_pose": 1.0, "drop_motion": 1.0}
    scene = build("motion", **shares).scene(batch, draws(0, 0, 0, 0))
    assert not scene.motion.any() and not scene.pose.any()
    assert all(layer.keys.shape[1] == 0 and not layer.constant.any() for layer in scene.memories[0])


def test_hidden_tokens_shorten_the_memory(build, batch: Batch):
    whole, part = (
        build("motion", **NOTHING_DROPPED | {"drop_reference_tokens": share}).scene(batch, draws(0, 0, 0, 0))
        for share in (0.0, 0.3)
    )
    assert [m.keys.shape[1] for m in part.memories[0]] == [round(m.keys.shape[1] * 0.7) for m in whole.memories[0]]


def test_an_image_phase_leaves_the_temporal_modules_and_the_other_networks_alone(build):
    trained = {name for name, parameter in build("motion").named_parameters() if parameter.requires_grad}
    networks = {name.split(".")[1] for name in trained}
    assert networks == {"reference_unet", "denoising_unet", "pose_guider", "motion_encoder"}
    assert not any("temporal_modules" in name for name in trained)


def test_without_temporal_modules_frames_do_not_see_each_other(build, batch: Batch):
    phase = build("motion", **NOTHING_DROPPED)
    scene = phase.scene(batch, draws(0, 0, 0, 0))
    timesteps = torch.full((5,), 500)
    with torch.no_grad(), without_temporal(phase.denoiser):
        whole = phase.denoiser(scene.latents, timesteps, scene.motion, scene.pose, scene.memories)
        alone = resampled(scene, slice(3, 4))
        single = phase.denoiser(alone.latents, timesteps[:1], alone.motion, alone.pose, scene.memories)
    assert torch.allclose(whole[:, 3:4], single, atol=1e-4)


def test_new_temporal_modules_do_nothing(build, batch: Batch):
    phase = build("motion", **NOTHING_DROPPED)
    scene = phase.scene(batch, draws(0, 0, 0, 0))
    arguments = (scene.latents, torch.full((5,), 500), scene.motion, scene.pose, scene.memories)
    with torch.no_grad():
        full = phase.denoiser(*arguments)
        with without_temporal(phase.denoiser):
            assert torch.allclose(full, phase.denoiser(*arguments), atol=1e-5)


def test_temporal_modules_are_back_after_an_error():
    denoiser = DenoisingUNet(smoke_model().unet, smoke_model().motion_encoder.token_dim)
    names = list(denoiser.state_dict())
    with pytest.raises(KeyError), without_temporal(denoiser):
        raise KeyError
    assert list(denoiser.state_dict()) == names


def test_noise_moves_poses_and_leaves_expressions(batch: Batch):
    config = AnimationConfig(pose_noise=1.0, portrait_noise=1.0)
    noisy = noisy_motions(batch.motions, config, np.random.default_rng(0))
    assert np.array_equal(noisy[..., 6:], batch.motions[..., 6:])
    assert 0.3 < np.abs(noisy - batch.motions)[..., :3].mean() < 3
    scales = noisy[..., 5] / batch.motions[..., 5]
    assert np.allclose(scales, scales[:, :1]) and not np.allclose(scales, 1)


def test_a_portrait_that_is_misjudged_turns_alone_and_takes_all_frames_along(batch: Batch):
    noisy = noisy_motions(batch.motions, AnimationConfig(portrait_noise=1.0), np.random.default_rng(0))
    wrong = noisy - batch.motions
    assert not wrong[:, 1:, :3].any() and (wrong[:, 0, :3] != 0).all()
    assert np.allclose(wrong[:, :, 3:5], wrong[:, :1, 3:5]) and (wrong[:, :, 3:5] != 0).all()


def test_without_noise_motions_stay_as_they_are(batch: Batch):
    assert np.array_equal(noisy_motions(batch.motions, AnimationConfig(), np.random.default_rng(0)), batch.motions)


def test_rounding_to_half_keeps_the_gradient():
    layer = torch.tensor([1.0001, 2.0], requires_grad=True)
    as_half(layer).sum().backward()
    assert as_half(layer)[0] == 1.0 and layer.grad.tolist() == [1.0, 1.0]


def test_hidden_keeps_tokens_in_their_order():
    kept = hidden(torch.arange(10.0)[:, None], 0.4, draws(0, 0, 0, 0))[:, 0]
    assert len(kept) == 6 and kept.tolist() == sorted(kept.tolist())


def test_a_portrait_that_is_gone_leaves_nothing_to_attend_to(build, batch: Batch):
    memory = build("motion").scene(batch, draws(0, 0, 0, 0)).memories[0]
    assert all(layer.values.shape[1] == 0 for layer in without_tokens(memory))


def test_errors_in_the_face_cost_more(batch: Batch):
    boxes, target = torch.tensor([[[16, 16, 48, 48]] * 4]), torch.zeros(1, 3, 64, 64)
    inside, outside = target.clone(), target.clone()
    inside[..., 20:24, 20:24], outside[..., :4, :4] = 1.0, 1.0
    costs = [float(image_loss(picture, target, boxes, 1.0, 3.0)) for picture in (inside, outside)]
    # As squares of a mask of 1 in the face and 2 in its parts are added.
    assert costs[0] == pytest.approx((1 + 2**2) * costs[1])


@pytest.fixture
def filmed(batch: Batch):
    """A batch of which nobody knows the truth."""
    return dataclasses.replace(
        batch, motions=np.full_like(batch.motions, np.nan), canonical=np.full_like(batch.canonical, np.nan)
    )


def test_softness_is_the_share_of_differences_between_neighbours_that_is_missing():
    picture = torch.rand(2, 3, 8, 10)
    mean = picture.mean((2, 3), keepdim=True)
    assert softness(picture, picture) == softness(mean + 2 * (picture - mean), picture) == 0
    torch.testing.assert_close(softness(mean + (picture - mean) / 2, picture), torch.tensor(0.75))
    even = torch.zeros(2, 3, 8, 10)
    assert softness(even, picture) == softness(even, even) == 1 and softness(picture, even) == 0


def test_filmed_clips_need_no_truth(build, filmed: Batch):
    update = build("motion")(filmed, draws(0, 0, 0, 0), 0, 0, None)
    assert torch.isfinite(update.loss)


@pytest.mark.parametrize(
    ("phase", "fields", "said"),
    [
        ("motion", {"poses": "truth"}, "poses=extractor"),
        ("distill", {"expressions": "truth"}, "expressions=encoder"),
        ("mover", {"poses": "truth"}, "poses=extractor"),
        ("keypoints", {}, "drawn clips"),
    ],
)
def test_filmed_clips_are_refused_where_truth_is_asked_for(build, filmed: Batch, phase, fields, said):
    with pytest.raises(BadData, match=said):
        build(phase, **fields)(filmed, draws(0, 0, 0, 0), 0, 0, None)


def test_an_unknown_network_cannot_be_trained(build):
    with pytest.raises(BadConfig, match="nonsense"):
        build("motion", trained=("nonsense", "denoising_unet"))


def test_crops_are_disturbed_sample_by_sample(build, batch: Batch):
    phase, seen = build("stream"), []
    phase.augment = lambda crops, rng, strength: seen.append(crops.shape) or crops
    phase.scene(batch, draws(0, 0, 0, 0))
    crop_px = phase.model.motion_encoder.crop_px
    assert seen == [(6, crop_px, crop_px, 3)] * 2
