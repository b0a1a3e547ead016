"""Pictures to network inputs, against transformers where it has the same step."""

import numpy as np
import pytest
import torch
from PIL import Image

from stages.images import clip_pixels, detector_frames, detector_portrait, face_crop, portrait_tensor, signed


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_signed_spans_minus_one_to_one_and_is_contiguous():
    frames = np.zeros((2, 3, 5, 3), np.uint8)
    frames[1, 2, 4] = (0, 255, 51)
    tensor = signed(frames)
    assert tensor.shape == (2, 3, 3, 5)
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor[1, :, 2, 4], torch.tensor([-1.0, 1.0, -0.6]))
    assert torch.equal(tensor[0], torch.full((3, 3, 5), -1.0))


def test_portrait_is_squeezed_to_the_square_by_lanczos():
    portrait = picture(30, 20)
    tensor = portrait_tensor(portrait, 12)
    expected = np.asarray(Image.fromarray(portrait).resize((12, 12), Image.Resampling.LANCZOS))
    assert tensor.shape == (1, 3, 12, 12)
    assert tensor.is_contiguous()
    assert np.array_equal(((tensor[0] + 1) * 127.5).round().permute(1, 2, 0).numpy(), expected)


def test_detector_inputs_are_between_zero_and_one():
    portrait = picture(16, 16)
    from_portrait = detector_portrait(portrait, 16)
    from_frame = detector_frames(signed(portrait[None]), 16)
    torch.testing.assert_close(from_portrait, torch.from_numpy(portrait / 255.0).float().permute(2, 0, 1)[None])
    torch.testing.assert_close(from_frame, from_portrait)


def test_face_crop_takes_exactly_the_box():
    frame = torch.zeros(3, 20, 30)
    frame[:, 4:9, 11:18] = 1
    crop = face_crop(frame, torch.tensor([11, 4, 18, 9]), 8)
    assert torch.equal(crop, torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize(("height", "width"), [(37, 24), (24, 37), (24, 24), (20, 61)])
def test_clip_pixels_equal_transformers(height: int, width: int):
    # By its full name: with torchvision installed the short one means another implementation, whose pixels differ.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    portrait = picture(height, width)
    expected = processor(Image.fromarray(portrait), return_tensors="pt").pixel_values
    pixels = clip_pixels(portrait, 24)
    assert pixels.is_contiguous()
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
