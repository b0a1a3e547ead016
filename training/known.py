"""What the world knows, in the networks' terms: keypoints from true motions, motion tokens from true expressions.

The bundled model's motion tokens are not discovered but given: each expression of `training.motion.EXPRESSION` is
written linearly into two tokens. So the denoiser can learn from exact tokens while the encoder still learns to read
them off pictures. Called by the phases and the evaluation.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.config import MotionEncoderConfig
from stages.keypoints import transform
from stages.networks.motion_encoder import MotionEncoder
from training.motion import EXPRESSION

FIRST_EXPRESSION = 6
"""Column of `gaze_x` in a motion's array; before it come pitch, yaw, roll, x, y, scale."""
TOKEN_SIZE = 0.7


def posed(canonical: Tensor, motions: Tensor) -> Tensor:
    """(n, K, 3) keypoints in the picture from canonical ones (n, K, 3) and motions (n, 14 or 6)."""
    return transform(canonical, motions[:, :3], F.pad(motions[:, 3:5], (0, 1)), motions[:, 5:6])


@lru_cache(maxsize=4)
def token_map(num_tokens: int, token_dim: int) -> Tensor:
    """(8, num_tokens · token_dim): how each expression is written into the tokens; a fixed random pattern of signs."""
    rng = np.random.default_rng(11)
    written = np.zeros((len(EXPRESSION), num_tokens, token_dim), np.float32)
    for index in range(len(EXPRESSION)):
        for token in (2 * index, 2 * index + 1):
            written[index, token % num_tokens] += TOKEN_SIZE * rng.choice([-1.0, 1.0], token_dim)
    return torch.from_numpy(written.reshape(len(EXPRESSION), -1))


def expression_tokens(expressions: Tensor, encoder: MotionEncoder, config: MotionEncoderConfig) -> Tensor:
    """(..., 8) expressions to the (..., T, D) tokens that a perfect encoder gives."""
    flat = expressions @ token_map(config.num_tokens, config.token_dim).to(expressions)
    return flat.unflatten(-1, (config.num_tokens, config.token_dim)) + encoder.pe[0]


def read_expression(tokens: Tensor, encoder: MotionEncoder, config: MotionEncoderConfig) -> Tensor:
    """The inverse, by least squares: (..., T, D) to (..., 8)."""
    flat = (tokens - encoder.pe[0]).flatten(-2)
    return flat @ torch.linalg.pinv(token_map(config.num_tokens, config.token_dim)).to(flat)
