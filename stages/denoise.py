"""The denoise stage: motion into the sliding windows, clean chunks out.

Called by the members and the in-process pipeline. The stage holds weights only: windows (`stages.window`) are values
that the caller keeps, and a call may hold those of several sessions. Whatever precision the networks run in, a window's
latents, tokens and bank are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from stages.canvas import MOVED, ShownPortrait, canvases
from stages.config import ModelConfig
from stages.groups import groups
from stages.messages import (
    CleanChunk,
    Floats,
    Keyframe,
    MotionChunk,
    Pixels,
    PortraitFeatures,
    ReferenceFeatures,
    WindowSnapshot,
)
from stages.networks.pose_guider import PoseGuider
from stages.networks.unet import DenoisingUNet, Memory, attention_names, project_memory
from stages.window import Motion, WindowState, WindowStep, add_keyframe, open_window, run_windows


@dataclass(frozen=True)
class DenoiseStage:
    """Pose guider and denoising UNet; weights only."""

    config: ModelConfig
    pose_guider: PoseGuider
    denoising_unet: DenoisingUNet

    @torch.inference_mode()
    def open(
        self, portrait: PortraitFeatures, portrait_tokens: Floats, seed: int, noise: Tensor | None = None
    ) -> WindowState:
        """A new session's window. portrait_tokens (T, D); seed 0 … 2^64 - 1; `noise` as in `open_window`."""
        token = self._tensor(portrait.token)
        state = open_window(
            self.config.window,
            portrait=self._tensor(portrait.latent),
            image_token=token,
            memory=self._memory(portrait.features, token),
            portrait_tokens=self._tensor(portrait_tokens),
            seed=seed,
            noise=noise,
        )
        return replace(state, picture=self._picture(portrait.pixels))

    @torch.inference_mode()
    def run(
        self, states: Sequence[WindowState], chunks: Sequence[MotionChunk]
    ) -> list[tuple[WindowState, CleanChunk, Keyframe | None]]:
        """One denoiser call over the windows of one or several sessions, each with its next chunk of motion.

        A Keyframe must be encoded and given to `add_keyframe` before that session's next call.
        """
        steps = self.steps(states, chunks)
        return [self._answer(*parts) for parts in zip(states, chunks, steps, strict=True)]

    @torch.inference_mode()
    def steps(
        self,
        states: Sequence[WindowState],
        chunks: Sequence[MotionChunk],
        noise: Sequence[Tensor | None] | None = None,
    ) -> list[WindowStep]:
        """`run` with its tensors still on the device; `noise` replaces each session's own."""
        states = self._introduced(states, chunks)
        motions = [
            self._motion(state, chunk.keypoints, chunk.tokens, chunk.moved)
            for state, chunk in zip(states, chunks, strict=True)
        ]
        given = noise or [None] * len(states)
        return [
            step
            for part in groups(len(states), self._parameter)
            for step in run_windows(self.denoising_unet, self.config.window, states[part], motions[part], given[part])
        ]

    @torch.inference_mode()
    def add_keyframe(self, state: WindowState, features: ReferenceFeatures) -> WindowState:
        """The window with a keyframe's features behind its memory."""
        return add_keyframe(state, self._memory(features, state.image_token))

    @torch.inference_mode()
    def snapshot(self, state: WindowState) -> WindowSnapshot:
        """What `restore` needs of a window, as arrays of its own."""
        arrays = [tensor.float().cpu().numpy() for tensor in (state.latents, state.tokens, state.bank)]
        latents, tokens, bank = arrays
        keypoints = np.empty((0, 0, 3), np.float32) if state.keypoints is None else state.keypoints
        return WindowSnapshot(
            state.seed,
            state.num_calls,
            latents,
            tokens,
            keypoints,
            bank,
            state.keyframes,
            state.portrait_keypoints,
        )

    @torch.inference_mode()
    def restore(
        self, portrait: PortraitFeatures, keyframes: Sequence[ReferenceFeatures], snapshot: WindowSnapshot
    ) -> WindowState:
        """The window of a snapshot. `keyframes`: the features of `snapshot.keyframes`, in their order."""
        token = self._tensor(portrait.token)
        num_frames = self.config.window.chunk_frames
        ends = range(num_frames, len(snapshot.keypoints), num_frames)
        parts = zip(np.split(snapshot.keypoints, ends), np.split(snapshot.tokens, ends), strict=True)
        state = WindowState(
            seed=snapshot.seed,
            num_calls=snapshot.num_calls,
            latents=self._tensor(snapshot.latents),
            tokens=self._tensor(snapshot.tokens),
            pose=token.new_empty(0),
            portrait=self._tensor(portrait.latent),
            image_token=token,
            memory=self._memory(portrait.features, token),
            bank=self._tensor(snapshot.bank),
            num_keyframes=len(snapshot.keyframes),
            keypoints=snapshot.keypoints if snapshot.num_calls else None,
            keyframes=snapshot.keyframes,
            picture=self._picture(portrait.pixels),
            portrait_keypoints=snapshot.portrait_keypoints,
        )
        if snapshot.num_calls:
            inside = [self._motion(state, *part) for part in parts]
            moved = [motion.moved for motion in inside if motion.moved is not None]
            pose = torch.cat([motion.pose for motion in inside])
            state = replace(state, pose=pose, moved=torch.cat(moved) if moved else None)
        for features in keyframes:
            state = add_keyframe(state, self._memory(features, token))
        return state

    def _answer(
        self, before: WindowState, chunk: MotionChunk, result: WindowStep
    ) -> tuple[WindowState, CleanChunk, Keyframe | None]:
        keypoints = chunk.keypoints if before.keypoints is None else np.concatenate([before.keypoints, chunk.keypoints])
        state = replace(result.state, keypoints=keypoints[self.config.window.chunk_frames :])
        moved = None if result.moved is None else result.moved.cpu().numpy()
        clean = CleanChunk(result.clean.float().cpu().numpy(), moved)
        if result.keyframe is None:
            return state, clean, None
        keyframe = Keyframe(result.keyframe.float().cpu().numpy(), state.image_token.float().cpu().numpy())
        return replace(state, keyframes=(*state.keyframes, keyframe)), clean, keyframe

    def _introduced(self, states: Sequence[WindowState], chunks: Sequence[MotionChunk]) -> list[WindowState]:
        """The windows, knowing the portrait's keypoints: a session's first motion starts at the portrait's own pose."""
        if not self.config.pose_guider.shows_portrait:
            return list(states)
        return [
            state if state.num_calls else replace(state, portrait_keypoints=chunk.keypoints[0].copy())
            for state, chunk in zip(states, chunks, strict=True)
        ]

    def _motion(
        self, state: WindowState, keypoints: Floats, tokens: Floats, moved: NDArray[np.float16] | None = None
    ) -> Motion:
        """What enters the window with f frames; keypoints travel rather than pose features, which are a thousand times
        larger."""
        shown = None
        if state.picture is not None and state.portrait_keypoints is not None:
            own = state.bank[0].unflatten(0, tokens.shape[1:])
            shown = ShownPortrait(state.picture, self._tensor(state.portrait_keypoints), own)
        mover = self.pose_guider.mover
        turned = None if moved is None else self._tensor(moved)
        told = self._tensor(tokens)
        seen = canvases(self._tensor(keypoints), told, shown, mover, self.config, turned)
        kept = seen[:, MOVED].half() if self.config.vae.kept_detail else None
        return Motion(told, self.pose_guider(seen.to(self._parameter.dtype)), kept)

    def _picture(self, pixels: Pixels | None) -> Tensor | None:
        """(3, s, s) in [0, 1]."""
        return None if pixels is None else self._tensor(rearrange(pixels, "h w c -> c h w") / np.float32(255))

    def _memory(self, features: ReferenceFeatures, token: Tensor) -> Memory:
        layers = [torch.from_numpy(layer).to(self._parameter) for layer in features.layers]
        names = attention_names(self.config.unet)
        return project_memory(self.denoising_unet, names, layers, token.to(self._parameter))

    def _tensor(self, array: NDArray[np.floating]) -> Tensor:
        """fp32, on the stage's device."""
        return torch.from_numpy(array).to(self._parameter.device, torch.float32)

    @property
    def _parameter(self) -> Tensor:
        """Stands for all: their device and precision."""
        return next(self.denoising_unet.parameters())
