"""The motion stage: driving frames to motion tokens and keypoints, retargeted to the portrait.

Called by the members (`cluster.member`) and the in-process pipeline. The stage holds weights only; what it must know of
a session is a `MotionState` that goes in and comes out. Specification, sections 6 and 10; a frame without a usable face
box holds the last motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from stages.config import ModelConfig
from stages.errors import BadPortrait
from stages.groups import groups
from stages.images import detector_frames, detector_portrait, face_crop, pixels_of, portrait_tensor, signed
from stages.keypoints import (
    box_is_usable,
    boxes,
    draw,
    frame_pose,
    interpolate,
    interpolate_start,
    pose_from_raw,
    posed_keypoints,
    retarget,
)
from stages.messages import Floats, MotionChunk, MotionState, Pixels, Pose
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.mover import Looked
from stages.networks.pose_guider import PoseGuider


@dataclass(frozen=True)
class MotionStage:
    """Keypoint extractor, motion encoder and mover; all methods are pure functions of arguments and weights."""

    config: ModelConfig
    keypoint_extractor: KeypointExtractor
    motion_encoder: MotionEncoder
    pose_guider: PoseGuider
    """Its `mover`, where the model has one, works here: the denoise stage has most to do, and this one has time."""

    @torch.inference_mode()
    def open(self, portrait: Pixels) -> MotionState:
        """Finds the face of a portrait, uint8 (h, w, 3), best square. Raises BadPortrait when there is none."""
        size_px = self.config.size_px
        pose = self.poses(detector_portrait(portrait, self.config.keypoints.image_px))
        box = boxes(posed_keypoints(pose), size_px, self.config.keypoints)[0]
        if not box_is_usable(box):
            raise BadPortrait(
                "no face was found in the portrait: use a picture of one person facing the camera, the head "
                "upright and filling a good part of the picture",
                "no_face_in_portrait",
            )
        picture = portrait_tensor(portrait, size_px)[0]
        tokens = self._tokens(face_crop(picture, box, self.config.motion_encoder.crop_px))[0]
        return MotionState(pose, tokens, picture=None if self.pose_guider.mover is None else pixels_of(picture))

    @torch.inference_mode()
    def run(self, states: Sequence[MotionState], frames: Sequence[Pixels]) -> list[tuple[MotionState, MotionChunk]]:
        """One chunk of driving frames, uint8 (f, size, size, 3), of each of several sessions, in one batch."""
        pictures = signed(np.concatenate(frames))
        ends = np.cumsum([0, *(len(chunk) for chunk in frames)])
        poses: list[Pose] = []
        tokens: list[Floats | None] = []
        # The extractor is of two precisions; where the encoder is in bfloat16, so is what it calculates for long.
        for group in groups(len(frames), next(self.motion_encoder.parameters())):
            seen = pictures[ends[group.start] : ends[group.stop]]
            found = self.poses(detector_frames(seen, self.config.keypoints.image_px))
            face_boxes = boxes(posed_keypoints(found), self.config.size_px, self.config.keypoints)
            poses += [frame_pose(found, index) for index in range(len(seen))]
            tokens += self._face_tokens(seen, face_boxes)
        results = [
            follow(self.config, state, poses[start:end], tokens[start:end])
            for state, (start, end) in zip(states, pairwise(ends), strict=True)
        ]
        return [self._moving(*result) for result in results]

    @torch.inference_mode()
    def poses(self, pictures: Tensor) -> Pose:
        """What the keypoint extractor finds in pictures (n, 3, image_px, image_px) in [0, 1]."""
        device = next(self.keypoint_extractor.parameters()).device
        return pose_from_raw(self.keypoint_extractor(pictures.to(device)))

    def _moving(self, state: MotionState, chunk: MotionChunk) -> tuple[MotionState, MotionChunk]:
        """The chunk with the portrait as it moves it, where the model has a network for that."""
        mover = self.pose_guider.mover
        if mover is None or state.picture is None:
            return state, chunk
        own = chunk.keypoints[0].copy() if state.own_keypoints is None else state.own_keypoints
        device = next(mover.parameters()).device
        picture = rearrange(state.picture, "h w c -> c h w") / np.float32(255)
        parts = (picture, own, chunk.keypoints, state.portrait_tokens, chunk.tokens)
        portrait, start, end, own_tokens, tokens = (torch.from_numpy(part).to(device) for part in parts)
        drawn = draw(end, self.config.size_px, self.config.keypoints)
        kept = {part.name: getattr(state, part.name) for part in fields(Looked)}
        if any(part is None for part in kept.values()):
            found = mover.look(portrait, start, own_tokens).half()
            kept = {name: getattr(found, name).cpu().numpy() for name in kept}
            state = replace(state, **kept)
        looked = Looked(**{name: torch.from_numpy(part).to(device) for name, part in kept.items()})
        moved = mover(drawn, portrait, start, end, own_tokens, tokens, looked)
        return replace(state, own_keypoints=own), replace(chunk, moved=moved.half().cpu().numpy())

    def _tokens(self, crops: Tensor) -> Floats:
        parameter = next(self.motion_encoder.parameters())
        return self.motion_encoder(crops.to(parameter)).float().cpu().numpy()

    def _face_tokens(self, pictures: Tensor, face_boxes: Tensor) -> list[Floats | None]:
        """(T, D) tokens per frame, None where the face box is unusable."""
        usable = [index for index, box in enumerate(face_boxes) if box_is_usable(box)]
        found: list[Floats | None] = [None] * len(face_boxes)
        if usable:
            crop_px = self.config.motion_encoder.crop_px
            crops = torch.cat([face_crop(pictures[index], face_boxes[index], crop_px) for index in usable])
            for index, tokens in zip(usable, self._tokens(crops), strict=True):
                found[index] = tokens
        return found


def follow(
    config: ModelConfig, state: MotionState, poses: Sequence[Pose], tokens: Sequence[Floats | None]
) -> tuple[MotionState, MotionChunk]:
    """Retargets one chunk: poses (n = 1 each) and tokens (None: no usable face) per driving frame, in order.

    The first chunk of a session is preceded by the transition from the portrait to its first frame.
    """
    start = retarget(state.portrait, state.portrait, state.portrait, config.keypoints)
    held_pose, held_tokens = (state.held or start), state.last_tokens
    held_tokens = state.portrait_tokens if held_tokens is None else held_tokens
    first, targets, out_tokens = state.first, [], []
    for pose, found in zip(poses, tokens, strict=True):
        if found is not None:
            first = pose if first is None else first
            held_pose, held_tokens = retarget(pose, first, state.portrait, config.keypoints), found
        targets.append(held_pose)
        out_tokens.append(held_tokens)
    keypoints = np.concatenate([posed_keypoints(target).numpy() for target in targets])
    chunk_tokens = np.stack(out_tokens)
    if not state.started:
        keypoints, chunk_tokens = with_transition(config, state, targets[0], keypoints, chunk_tokens)
    after = replace(state, started=True, first=first, last_tokens=held_tokens, held=held_pose)
    return after, MotionChunk(chunk_tokens, keypoints, tuple(found is None for found in tokens))


def with_transition(
    config: ModelConfig, state: MotionState, target: Pose, keypoints: Floats, tokens: Floats
) -> tuple[Floats, Floats]:
    """Puts the motion-interpolated start in front of a session's first chunk (paper, section 3.3).

    Its first frame is the portrait as it is, which the denoise stage counts on, also without `interpolated_start`.
    """
    num_frames = config.window.num_transition_frames
    leading = posed_keypoints(interpolate_start(state.portrait, target, num_frames)).numpy()
    leading_tokens = interpolate(repeat(state.portrait_tokens, "t d -> 1 t d"), tokens[:1], num_frames)
    if not config.window.interpolated_start:
        leading[1:], leading_tokens[1:] = keypoints[0], tokens[0]
    return np.concatenate([leading, keypoints]), np.concatenate([leading_tokens, tokens])
