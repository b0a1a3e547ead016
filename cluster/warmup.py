"""A session of blank pictures through all stages, before the first person comes. Called by `cluster.pool`.

The first calls of a process are slow, and admission needs to know how long calls take.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.messages import SessionRecord
from stages.config import ModelConfig
from stages.messages import MotionState, Pose

NUM_CHUNKS = 4
MAX_S = 10.0
"""A model that is slower than that for this machine is not made to wait longer."""
SESSION = "warm-up"


async def warm_up(config: ModelConfig, members: Mapping[str, Any]) -> None:
    """Sends some chunks through these members, actor handles by stage. Raises what they raise."""
    size_px, window = config.size_px, config.window
    portrait = np.full((size_px, size_px, 3), 128, np.uint8)
    frames = np.stack([portrait] * window.chunk_frames)
    motion, due_s, record = blank_motion(config), time.time(), SessionRecord(SESSION, 0, SESSION, {})
    features = members["reference"].open_reference.remote(portrait)
    await members["denoise"].open_session.remote(record, features, motion, 0, members["reference"])
    started_s = time.monotonic()
    for number in range(NUM_CHUNKS):
        motion, moved = members["motion"].motion.remote(motion, frames, due_s)
        clean, _ = members["denoise"].denoise.remote(record.key, number, moved, motion, due_s)
        await members["decode"].decode.remote(clean, due_s)
        if time.monotonic() - started_s > MAX_S:
            break
    await asyncio.wait_for(members["denoise"].close_session.remote(SESSION), MAX_S)


def blank_motion(config: ModelConfig) -> MotionState:
    """The motion state of a portrait without a face: opening one would be refused."""

    def zeros(*shape: int) -> Any:
        return np.zeros(shape, np.float32)

    pose = Pose(zeros(1, config.keypoints.num_keypoints, 3), zeros(1, 3), zeros(1, 3), zeros(1, 1) + 1)
    tokens = zeros(config.motion_encoder.num_tokens, config.motion_encoder.token_dim)
    is_moved = bool(config.pose_guider.mover_channels)
    picture = np.zeros((config.size_px, config.size_px, 3), np.uint8) if is_moved else None
    return MotionState(pose, tokens, picture=picture)
