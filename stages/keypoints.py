"""Implicit keypoints as pure functions: head pose, retargeting, the start's transition, drawing, face boxes.

Called by the motion stage (poses and boxes), the denoise stage (drawing) and training. Keypoints are (n, K, 3); x and y
in [-1, 1] span the picture, y downwards. Sections are those of the inference specification.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from stages.config import KeypointConfig
from stages.messages import Floats, Pose
from stages.networks.keypoint_extractor import RawPose, degrees_of

# A face box reaches a little further right and down than left and up.
BOX_SHARE_BEFORE, BOX_SHARE_AFTER = 0.95, 1.05


def rotation(degrees: Tensor) -> Tensor:
    """(n, 3) pitch, yaw, roll to (n, 3, 3) matrices that act on row vectors from the right (section 6.2)."""
    pitch, yaw, roll = (degrees / 180.0 * math.pi).unbind(dim=-1)
    one, zero = torch.ones_like(pitch), torch.zeros_like(pitch)
    about_x = _matrix([one, zero, zero, zero, pitch.cos(), -pitch.sin(), zero, pitch.sin(), pitch.cos()])
    about_y = _matrix([yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos()])
    about_z = _matrix([roll.cos(), -roll.sin(), zero, roll.sin(), roll.cos(), zero, zero, zero, one])
    return rearrange(about_z @ about_y @ about_x, "n i j -> n j i")


def _matrix(entries: list[Tensor]) -> Tensor:
    return rearrange(torch.stack(entries, dim=-1), "n (i j) -> n i j", i=3)


def transform(canonical: Tensor, degrees: Tensor, translation: Tensor, scale: Tensor) -> Tensor:
    """Canonical keypoints (n, K, 3) rotated, scaled (n, 1), and moved by translation (n, 3) in x and y but not in z."""
    posed = (canonical @ rotation(degrees)) * scale[:, None]
    flat = torch.cat([translation[:, :2], torch.zeros_like(translation[:, 2:])], dim=-1)
    return posed + flat[:, None]


def pose_from_raw(raw: RawPose) -> Pose:
    """Interprets the extractor's heads; numpy, so that it can be kept and sent."""
    canonical = rearrange(raw.keypoints, "n (k c) -> n k c", c=3)
    parts = (canonical, degrees_of(raw), raw.translation, raw.scale)
    return Pose(*(part.float().cpu().numpy() for part in parts))


def posed_keypoints(pose: Pose) -> Tensor:
    """(n, K, 3) keypoints of n poses."""
    parts = (pose.canonical, pose.degrees, pose.translation, pose.scale)
    return transform(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def frame_pose(pose: Pose, index: int) -> Pose:
    """The pose of one frame, n = 1."""
    frame = slice(index, index + 1)
    return Pose(pose.canonical[frame], pose.degrees[frame], pose.translation[frame], pose.scale[frame])


def retarget(driving: Pose, first: Pose, portrait: Pose, config: KeypointConfig) -> Pose:
    """The portrait in the pose of n driving frames (sections 6.3, 6.4).

    Rotation is the driver's own; translation is the driver's since its first frame, times `translation_scale`, from the
    portrait's; scale and canonical keypoints are the portrait's.
    """
    n = len(driving.degrees)
    moved = (driving.translation - first.translation) * np.float32(config.translation_scale)
    return replace(
        driving,
        canonical=repeat(portrait.canonical, "1 k c -> n k c", n=n),
        translation=moved + portrait.translation,
        scale=repeat(portrait.scale, "1 c -> n c", n=n),
    )


def interpolate(start: Floats, end: Floats, num_frames: int) -> Floats:
    """`num_frames` equal steps from `start` (1, ...) towards `end` (1, ...); `end` itself is the frame after them."""
    share: Floats = torch.linspace(0, 1, num_frames + 1)[:-1].reshape(-1, *[1] * (start.ndim - 1)).numpy()
    return (np.float32(1) - share) * start + share * end


def interpolate_start(portrait: Pose, first: Pose, num_frames: int) -> Pose:
    """The transition of `num_frames` poses from the portrait to the first retargeted driving pose (section 6.3)."""
    return Pose(
        canonical=repeat(portrait.canonical, "1 k c -> n k c", n=num_frames),
        degrees=interpolate(portrait.degrees, first.degrees, num_frames),
        translation=interpolate(portrait.translation, first.translation, num_frames),
        scale=interpolate(portrait.scale, first.scale, num_frames),
    )


def drawn_points(keypoints: Tensor, size_px: int, config: KeypointConfig) -> Tensor:
    """Integer pixel positions (n, drawn, 2) of the keypoints that are drawn and boxed, truncated toward zero."""
    points = keypoints[:, list(config.drawn), :2] * 0.5 + 0.5
    return (points * size_px).long()


def draw(keypoints: Tensor, size_px: int, config: KeypointConfig) -> Tensor:
    """Canvases (n, 3, size, size) in [0, 1]: a coloured disc per drawn keypoint, overlaps added (section 6.5)."""
    radius = torch.arange(-config.radius_px, config.radius_px + 1, device=keypoints.device)
    offsets = torch.cartesian_prod(radius, radius)
    disc = offsets[(offsets**2).sum(dim=-1) <= config.radius_px**2]
    # Discs that are off the picture fall into a margin that is cut off.
    margin = 2 * config.radius_px + 1
    centres = drawn_points(keypoints, size_px, config).clamp(-config.radius_px - 1, size_px + config.radius_px)
    x, y = (rearrange(centres, "n k c -> n k 1 c") + disc + margin).unbind(dim=-1)
    frames = rearrange(torch.arange(len(keypoints), device=keypoints.device), "n -> n 1 1").expand_as(x)
    colours = torch.tensor(config.colours, dtype=torch.float32, device=keypoints.device) / 255
    wide = size_px + 2 * margin
    canvas = keypoints.new_zeros((len(keypoints), wide, wide, 3), dtype=torch.float32)
    canvas.index_put_((frames, y, x), rearrange(colours, "k c -> k 1 c").expand(*x.shape, 3), accumulate=True)
    inside = slice(margin, margin + size_px)
    return rearrange(canvas[:, inside, inside].clamp(0, 1), "n h w c -> n c h w").contiguous()


def boxes(keypoints: Tensor, size_px: int, config: KeypointConfig) -> Tensor:
    """Face boxes (n, 4) int64 as x1, y1, x2, y2 (exclusive), clamped to the picture; may be empty (section 6.6)."""
    points = drawn_points(keypoints, size_px, config).float()
    centre = points.mean(dim=1)
    side = (centre[:, 1] - points[:, :, 1].amin(dim=1)) * 2 * config.box_factor
    before = centre - side[:, None] / 2 * BOX_SHARE_BEFORE
    after = centre + side[:, None] / 2 * BOX_SHARE_AFTER
    return torch.cat([before, after], dim=-1).clamp(0, size_px - 1).long()


def box_is_usable(box: Tensor) -> bool:
    """Whether a box (4,) of `boxes` encloses any pixels: it does not when the face is off the picture or degenerate."""
    x1, y1, x2, y2 = box.tolist()
    return x2 > x1 and y2 > y1
