"""Stages that sleep instead of working, with messages of real sizes: for measuring the actors. Used by members.

A session asks for one keyframe, at the first call where the method allows it, so that the reference stage has its part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.config import ModelConfig
from stages.messages import (
    CleanChunk,
    Keyframe,
    MotionChunk,
    MotionState,
    Pixels,
    PortraitFeatures,
    Pose,
    ReferenceFeatures,
    WindowSnapshot,
)

CONFIG = ModelConfig(name="artificial", size_px=256)


@dataclass(frozen=True)
class ArtificialWindow:
    """Stands for a WindowState."""

    num_calls: int = 0
    num_keyframes: int = 0
    keyframes: tuple[Keyframe, ...] = ()


@dataclass(frozen=True)
class ArtificialMotion:
    """Sleeps `ms` per call, as all stages here do; `MotionStage` without its work."""

    ms: float

    def open(self, portrait: Pixels) -> MotionState:
        points = CONFIG.keypoints.num_keypoints
        pose = Pose(_zeros(1, points, 3), _zeros(1, 3), _zeros(1, 3), _zeros(1, 1))
        return MotionState(pose, _zeros(CONFIG.motion_encoder.num_tokens, CONFIG.motion_encoder.token_dim))

    def run(self, states: Sequence[MotionState], frames: Sequence[Pixels]) -> list[tuple[MotionState, MotionChunk]]:
        _sleep(self.ms)
        encoder, points = CONFIG.motion_encoder, CONFIG.keypoints.num_keypoints
        return [
            (
                state,
                MotionChunk(
                    tokens=_zeros(len(chunk), encoder.num_tokens, encoder.token_dim),
                    keypoints=_zeros(len(chunk), points, 3),
                    no_face=(False,) * len(chunk),
                ),
            )
            for state, chunk in zip(states, frames, strict=True)
        ]


@dataclass(frozen=True)
class ArtificialReference:
    """`ReferenceStage` without its work."""

    ms: float

    def open(self, portrait: Pixels) -> PortraitFeatures:
        _sleep(self.ms)
        return PortraitFeatures(_features(), _zeros(CONFIG.unet.cross_attention_dim), _zeros(*CONFIG.latent_shape))

    def keyframe(self, keyframe: Keyframe) -> ReferenceFeatures:
        _sleep(self.ms)
        return _features()


@dataclass(frozen=True)
class ArtificialDenoise:
    """`DenoiseStage` without its work."""

    ms: float

    def open(self, portrait: PortraitFeatures, portrait_tokens: object, seed: int) -> ArtificialWindow:
        return ArtificialWindow()

    def run(
        self, states: Sequence[ArtificialWindow], chunks: Sequence[MotionChunk]
    ) -> list[tuple[ArtificialWindow, CleanChunk, Keyframe | None]]:
        _sleep(self.ms)
        clean = CleanChunk(_zeros(CONFIG.window.chunk_frames, *CONFIG.latent_shape))
        keyframe = Keyframe(clean.latents[0], _zeros(CONFIG.unet.cross_attention_dim))
        return [self._answer(state, clean, keyframe) for state in states]

    def add_keyframe(self, state: ArtificialWindow, features: ReferenceFeatures) -> ArtificialWindow:
        return replace(state, num_keyframes=state.num_keyframes + 1)

    def snapshot(self, state: ArtificialWindow) -> WindowSnapshot:
        """As large as a real one."""
        window = CONFIG.window
        latents = _zeros(window.num_transition_frames, *CONFIG.latent_shape)
        tokens = _zeros(window.num_transition_frames, CONFIG.motion_encoder.num_tokens, CONFIG.motion_encoder.token_dim)
        keypoints = _zeros(window.num_transition_frames, CONFIG.keypoints.num_keypoints, 3)
        return WindowSnapshot(0, state.num_calls, latents, tokens, keypoints, _zeros(1, 1), state.keyframes)

    def restore(
        self, portrait: PortraitFeatures, keyframes: Sequence[ReferenceFeatures], snapshot: WindowSnapshot
    ) -> ArtificialWindow:
        return ArtificialWindow(snapshot.num_calls, len(keyframes), snapshot.keyframes)

    def _answer(
        self, state: ArtificialWindow, clean: CleanChunk, keyframe: Keyframe
    ) -> tuple[ArtificialWindow, CleanChunk, Keyframe | None]:
        after = replace(state, num_calls=state.num_calls + 1)
        if state.num_calls != CONFIG.window.first_keyframe_call:
            return after, clean, None
        return replace(after, keyframes=(*state.keyframes, keyframe)), clean, keyframe


@dataclass(frozen=True)
class ArtificialDecode:
    """`DecodeStage` without its work."""

    ms: float

    def run(self, chunks: Sequence[CleanChunk]) -> list[Pixels]:
        _sleep(self.ms)
        return [np.zeros((len(chunk.latents), CONFIG.size_px, CONFIG.size_px, 3), np.uint8) for chunk in chunks]


@dataclass(frozen=True)
class ArtificialStages:
    """Stands for `stages.pipeline.Stages`."""

    config: ModelConfig
    motion: ArtificialMotion
    reference: ArtificialReference
    denoise: ArtificialDenoise
    decode: ArtificialDecode


def artificial_stages(artificial_ms: Sequence[tuple[str, float]]) -> ArtificialStages:
    """All four stages; those not named take no time."""
    ms = dict(artificial_ms)
    return ArtificialStages(
        CONFIG,
        ArtificialMotion(ms.get("motion", 0.0)),
        ArtificialReference(ms.get("reference", 0.0)),
        ArtificialDenoise(ms.get("denoise", 0.0)),
        ArtificialDecode(ms.get("decode", 0.0)),
    )


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _features() -> ReferenceFeatures:
    """A layer of each resolution that carries attention, of about the tiny model's size."""
    return ReferenceFeatures(tuple(np.zeros((side**2, 64), np.float16) for side in (32, 16, 8)))


def _sleep(ms: float) -> None:
    if ms:
        time.sleep(ms / 1e3)
