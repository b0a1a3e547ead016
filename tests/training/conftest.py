"""The smoke recipe's very small model, and a batch of two drawn people for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stages.config import ModelConfig
from stages.weights import NETWORKS
from training.clips import Batch
from training.draw import pose_motions, talk_motions
from training.identity import sample_identity
from training.motion import Motion, to_array
from training.recipes import smoke_model
from training.world import canonical_keypoints, feature_boxes, render

SIZE = 64


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Two frames a chunk, three levels; 64x64 pictures and 8x8 latents of 24 channels."""
    return smoke_model()


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Two people, a reference and five independent frames each."""
    return drawn_batch({41: pose_motions, 42: pose_motions}, 6)


@pytest.fixture(scope="session")
def clip() -> Batch:
    """One person, a reference and ten frames that follow each other."""
    return drawn_batch({43: talk_motions}, 11)


@pytest.fixture(scope="session")
def face_finders(config: ModelConfig, find_faces: Callable[..., None]) -> Callable[[int], dict[str, Any]]:
    """face_finders(seed): random networks by name, but a keypoint extractor that finds a face in the middle of
    everything."""

    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        networks: dict[str, Any] = {name: build(config) for name, build in NETWORKS.items()}
        find_faces(networks["keypoint_extractor"], 0.01)
        return networks

    return make


def drawn_batch(people: dict, num_pictures: int) -> Batch:
    samples = [drawn_sample(seed, plan(np.random.default_rng(seed), num_pictures)) for seed, plan in people.items()]
    parts = (np.stack(part) for part in zip(*samples, strict=True))
    return Batch(*parts, clips=np.arange(len(samples)), people=np.array(list(people)))


def drawn_sample(seed: int, motions: list[Motion]) -> tuple[np.ndarray, ...]:
    person = sample_identity(seed)
    boxes = [feature_boxes(person, motion, SIZE) for motion in motions]
    names = ("face", "left_eye", "right_eye", "mouth")
    return (
        np.stack([render(person, motion, SIZE) for motion in motions]),
        np.stack([np.stack([box[name] for name in names]) for box in boxes]),
        np.stack([to_array(motion) for motion in motions]),
        canonical_keypoints(person),
    )
