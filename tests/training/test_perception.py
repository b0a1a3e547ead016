"""The two networks that look at a driving frame: exact targets, honest augmentation, and they learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.config import ModelConfig
from stages.keypoints import box_is_usable, boxes, posed_keypoints
from stages.messages import Pose
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.networks.motion_encoder import MotionEncoder
from training.identity import sample_identity
from training.motion import Motion, to_array
from training.perception import (
    NOWHERE,
    empty_picture,
    expression_tokens,
    prime_bottleneck,
    read_expression,
    reframe,
    train_keypoints,
    train_motion_encoder,
)
from training.quick import all_frames
from training.samples import People
from training.world import render


def test_expressions_survive_the_way_through_tokens(config: ModelConfig):
    encoder = MotionEncoder(config.motion_encoder)
    expressions = torch.linspace(-1, 1, 24).reshape(3, 8)
    tokens = expression_tokens(expressions, encoder, config.motion_encoder)
    assert tokens.shape == (3, 5, 12)
    assert torch.allclose(read_expression(tokens, encoder, config.motion_encoder), expressions, atol=1e-4)


def test_a_primed_encoder_reads_its_single_channel_stretch_by_stretch(config: ModelConfig):
    encoder = MotionEncoder(config.motion_encoder)
    prime_bottleneck(encoder, config.motion_encoder)
    cells = torch.full((1, 16), 1.5)
    cells[0, 2:4] += 0.4
    with torch.no_grad():
        tokens = encoder.final_proj(encoder.model.fc(cells)).unflatten(-1, (5, 12)) + encoder.pe
        read = read_expression(tokens, encoder, config.motion_encoder)[0]
    assert read.argmax() == 1


def test_a_reframed_picture_shows_the_pose_that_is_said():
    motion = Motion(yaw=12.0, roll=5.0, x=0.05, scale=0.6)
    picture = render(sample_identity(31), motion, 128)
    moved, pose = reframe(picture, to_array(motion)[:6], 128, np.random.default_rng(2))
    said = Motion(*(float(value) for value in pose))
    redrawn = render(sample_identity(31), said, 128)
    centre = slice(44, 84)
    difference = np.abs(moved[centre, centre].astype(int) - redrawn[centre, centre]).mean()
    unmoved = np.abs(picture[centre, centre].astype(int) - redrawn[centre, centre]).mean()
    assert difference < 0.5 * unmoved


def test_the_taught_absence_of_a_person_is_an_unusable_box(config: ModelConfig):
    pose = Pose(
        canonical=np.random.default_rng(0).normal(size=(1, 21, 3)).astype(np.float32),
        degrees=np.zeros((1, 3), np.float32),
        translation=np.array([NOWHERE], np.float32),
        scale=np.full((1, 1), 0.05, np.float32),
    )
    assert not box_is_usable(boxes(posed_keypoints(pose), config.size_px, config.keypoints)[0])


@pytest.mark.parametrize("seed", range(5))
def test_empty_pictures_are_pictures(seed: int):
    picture = empty_picture(48, np.random.default_rng(seed))
    assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8


def test_a_few_steps_reduce_the_keypoint_loss(config: ModelConfig, people: People):
    torch.manual_seed(0)
    extractor = KeypointExtractor(config.keypoints)
    losses = train_keypoints(extractor, config.keypoints, all_frames(people), 1.0, seed=0, batch=8, num_steps=60)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_few_steps_reduce_the_expression_loss(config: ModelConfig, people: People):
    torch.manual_seed(0)
    encoder = MotionEncoder(config.motion_encoder)
    prime_bottleneck(encoder, config.motion_encoder)
    losses = train_motion_encoder(encoder, config, all_frames(people), 1.0, seed=0, batch=8, num_steps=60)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert not encoder.model.att_2._forward_hooks
