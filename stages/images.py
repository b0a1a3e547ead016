"""Pictures to network inputs: resizing, value ranges, crops (spec section 8). For the motion and reference stages.

Everything returned is contiguous NCHW: a transposed view of an NHWC array counts as channels-last, on which torch's CPU
GroupNorm loses up to three digits.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stages.messages import Pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def signed(pixels: Pixels) -> Tensor:
    """uint8 (n, h, w, 3) to float32 (n, 3, h, w) in [-1, 1]."""
    channels_first = rearrange(pixels, "n h w c -> n c h w").astype(np.float32, order="C")
    return torch.from_numpy(channels_first).div_(255).mul_(2).sub_(1)


def pixels_of(picture: Tensor) -> Pixels:
    """A picture (3, s, s) in [-1, 1] as uint8 (s, s, 3)."""
    return rearrange((picture / 2 + 0.5) * 255, "c h w -> h w c").round().to(torch.uint8).contiguous().numpy()


def portrait_tensor(portrait: Pixels, size_px: int) -> Tensor:
    """uint8 (h, w, 3) squeezed to (1, 3, size, size) in [-1, 1] by LANCZOS, whatever its aspect: crop before."""
    resized = Image.fromarray(portrait).resize((size_px, size_px), Image.Resampling.LANCZOS)
    return signed(np.asarray(resized)[None])


def detector_portrait(portrait: Pixels, image_px: int) -> Tensor:
    """The portrait for the keypoint extractor: (1, 3, image_px, image_px) in [0, 1]."""
    return portrait_tensor(portrait, image_px) / 2 + 0.5


def detector_frames(frames: Tensor, image_px: int) -> Tensor:
    """Driving frames (n, 3, h, w) in [-1, 1] for the keypoint extractor: (n, 3, image_px, image_px) in [0, 1]."""
    return _bilinear(frames, image_px) / 2 + 0.5


def face_crop(frame: Tensor, box: Tensor, crop_px: int) -> Tensor:
    """The box (4,) of one picture (3, h, w), scaled to (1, 3, crop_px, crop_px). The box must enclose pixels."""
    x1, y1, x2, y2 = box.tolist()
    return _bilinear(frame[None, :, y1:y2, x1:x2], crop_px)


def _bilinear(images: Tensor, side_px: int) -> Tensor:
    if images.shape[-2:] == (side_px, side_px):
        return images.contiguous()
    # Without antialiasing, as the networks were trained.
    resized = F.interpolate(images, size=(side_px, side_px), mode="bilinear", align_corners=False)
    return resized.contiguous()


def clip_pixels(portrait: Pixels, image_px: int) -> Tensor:
    """CLIP's own pre-processing: shorter side to `image_px` by BICUBIC, centre crop, normalised (1, 3, px, px)."""
    height, width = portrait.shape[:2]
    longer = int(image_px * max(height, width) / min(height, width))
    size = (image_px, longer) if width <= height else (longer, image_px)
    resized = np.asarray(Image.fromarray(portrait).resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - image_px) // 2, (resized.shape[1] - image_px) // 2
    cropped = resized[top : top + image_px, left : left + image_px]
    scaled = (cropped.astype(np.float64) * (1 / 255)).astype(np.float32)
    normalised = (scaled - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return rearrange(torch.from_numpy(normalised), "h w c -> 1 c h w").contiguous()
