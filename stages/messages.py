"""What crosses between stages: frozen dataclasses of numpy arrays. No torch, no Ray.

f = frames of a chunk, K = keypoints, T x D = motion tokens, h x w = latent sides, L x C = tokens of an attention layer.
A session's first motion chunk also carries the transition from the portrait, so it has `num_transition_frames` more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Pose:
    """Raw output of the keypoint extractor for n frames."""

    canonical: Floats
    """(n, K, 3) keypoints before pose."""
    degrees: Floats
    """(n, 3) pitch, yaw, roll."""
    translation: Floats
    """(n, 3)."""
    scale: Floats
    """(n, 1)."""


@dataclass(frozen=True)
class MotionState:
    """What the motion stage must know of a session; passed in and returned with every chunk."""

    portrait: Pose
    """The portrait's own pose, n = 1."""
    portrait_tokens: Floats
    """(T, D) motion tokens of the portrait's face."""
    started: bool = False
    """Whether the transition from the portrait has been sent."""
    first: Pose | None = None
    """Pose of the first driving frame with a usable face, n = 1: translations are relative to it."""
    last_tokens: Floats | None = None
    """(T, D) tokens of the last frame that had a usable face: held while there is none."""
    held: Pose | None = None
    """That frame's retargeted pose, n = 1."""
    picture: Pixels | None = None
    """(s, s, 3) the portrait, only for a model whose motion stage moves it (`PoseGuiderConfig.mover_channels`)."""
    own_keypoints: Floats | None = None
    """(K, 3) of the portrait, with which the first chunk begins; likewise."""
    depths: NDArray[np.float16] | None = None
    """(5, h, h) of the portrait's head (`stages.networks.depths`), known from the first chunk on; likewise."""
    fields: NDArray[np.float16] | None = None
    """(fields, told, g, g) what expressions can do to this portrait (`stages.networks.expressions`); likewise."""
    light: NDArray[np.float16] | None = None
    """(3, m, m) the portrait's light (`stages.networks.light`); likewise."""
    apart: NDArray[np.float16] | None = None
    """(2, 3, s, s) the portrait's head, and the portrait without it (`stages.apart`); likewise."""


@dataclass(frozen=True)
class MotionChunk:
    """Motion to denoise: one chunk of motion, retargeted to the portrait."""

    tokens: Floats
    """(f, T, D); on a session's first chunk (num_transition_frames + f, T, D)."""
    keypoints: Floats
    """(f, K, 3), likewise longer on the first chunk; [-1, 1] spans the picture."""
    no_face: tuple[bool, ...]
    """Per driving frame: True where no usable face was found and the last motion is held."""
    moved: NDArray[np.float16] | None = None
    """(f, 3, s, s) in [0, 1], likewise longer: the portrait as this motion moves it, where the motion stage has done
    so; elsewhere it is left to the denoise stage."""


@dataclass(frozen=True)
class ReferenceFeatures:
    """Reference to denoise: what the denoiser reads of the portrait, or of a keyframe."""

    layers: tuple[NDArray[np.float16], ...]
    """(L, C) per attention layer in running order (`unet.attention_names`), rounded to fp16 as the method does."""


@dataclass(frozen=True)
class PortraitFeatures:
    """Reference to denoise, once per session."""

    features: ReferenceFeatures
    token: Floats
    """(cross_attention_dim,) the image encoder's token."""
    latent: Floats
    """(c, h, w) the portrait's latent."""
    pixels: Pixels | None = None
    """(s, s, 3) the portrait, only for a model whose canvases show it (`PoseGuiderConfig.shows_portrait`)."""


@dataclass(frozen=True)
class CleanChunk:
    """Denoise to decode: the chunk that left the window."""

    latents: Floats
    """(f, c, h, w)."""
    moved: NDArray[np.float16] | None = None
    """(f, 3, s, s) in [0, 1], the moved portrait of the same frames, only for a model whose decoded frames get detail
    of it (`VaeConfig.kept_detail`)."""


@dataclass(frozen=True)
class Keyframe:
    """Denoise to reference: a finished frame that is to extend the reference memory."""

    latent: Floats
    """(c, h, w)."""
    token: Floats
    """(cross_attention_dim,) the portrait's token."""


@dataclass(frozen=True)
class WindowSnapshot:
    """What cannot be computed again of a session's window: enough, with the portrait, to go on anywhere.

    n = frames inside; tokens and keypoints are empty before the first call.
    """

    seed: int
    num_calls: int
    latents: Floats
    """(n, c, h, w), partly denoised, oldest first."""
    tokens: Floats
    """(n, T, D)."""
    keypoints: Floats
    """(n, K, 3): the pose features follow from them."""
    bank: Floats
    """(m, T · D) the motion bank."""
    keyframes: tuple[Keyframe, ...]
    """In the order in which they extended the memory."""
    portrait_keypoints: Floats | None = None
    """(K, 3), where the canvases show the portrait; None before the first call."""
