"""What the world knows, in the networks' terms."""

from __future__ import annotations

import numpy as np
import torch

from stages.config import ModelConfig
from stages.networks.motion_encoder import MotionEncoder
from training.identity import sample_identity
from training.known import expression_tokens, posed, read_expression
from training.motion import Motion, to_array
from training.world import canonical_keypoints, project, true_pose


def test_expressions_survive_the_way_through_tokens(config: ModelConfig):
    encoder = MotionEncoder(config.motion_encoder)
    expressions = torch.linspace(-1, 1, 24).reshape(3, 8)
    tokens = expression_tokens(expressions, encoder, config.motion_encoder)
    assert tokens.shape == (3, 5, 12)
    assert torch.allclose(read_expression(tokens, encoder, config.motion_encoder), expressions, atol=1e-4)


def test_posed_keypoints_are_those_that_the_world_draws():
    person, motion = sample_identity(4), Motion(pitch=7, yaw=-20, roll=4, x=0.1, y=-0.05, scale=0.6)
    canonical = torch.from_numpy(canonical_keypoints(person))[None]
    found = posed(canonical, torch.from_numpy(to_array(motion))[None])
    assert np.allclose(found.numpy(), project(true_pose(person, motion)), atol=1e-5)
