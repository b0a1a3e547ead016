import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.decode import DecodeStage
from stages.messages import CleanChunk


@pytest.fixture
def decode(stages) -> DecodeStage:
    return stages.decode


def clean(seed: int, num_frames: int) -> CleanChunk:
    latents = np.random.default_rng(seed).normal(size=(num_frames, 12, 6, 6))
    return CleanChunk(latents.astype(np.float32))


def moved(seed: int, num_frames: int) -> NDArray[np.float16]:
    return np.random.default_rng(seed).uniform(size=(num_frames, 3, 48, 48)).astype(np.float16)


def test_a_chunk_becomes_uint8_frames_of_the_models_size(decode):
    [frames] = decode.run([clean(0, 2)])
    assert (frames.shape, frames.dtype) == ((2, 48, 48, 3), np.uint8)
    assert frames.std() > 1


def test_sessions_get_their_own_frames_back_as_if_they_were_alone(decode):
    """Chunks of different lengths in one batch; another batch size may round the last value otherwise."""
    chunks = [clean(seed, num_frames) for seed, num_frames in ((0, 2), (1, 3), (2, 1))]
    together = decode.run(chunks)
    assert [len(frames) for frames in together] == [2, 3, 1]
    for chunk, frames in zip(chunks, together, strict=True):
        [alone] = decode.run([chunk])
        assert np.abs(frames.astype(int) - alone).max() <= 1
        assert (frames != alone).mean() < 0.01
    assert np.abs(together[0][0].astype(int) - together[1][0]).mean() > 1


def test_values_are_truncated_not_rounded(decode):
    chunk = clean(0, 2)
    exact = decode.decode(torch.from_numpy(chunk.latents)).numpy() * np.float32(255)
    assert np.array_equal(decode.run([chunk])[0], np.floor(exact).astype(np.uint8))
    assert (exact - np.floor(exact)).max() > 0.5


def test_minus_one_to_one_becomes_black_to_white(decode):
    latents = torch.from_numpy(clean(0, 2).latents)
    expected = (decode.vae.decode(latents) + 1) / 2
    frames = decode.decode(latents)
    assert frames.shape == (2, 48, 48, 3)
    torch.testing.assert_close(frames.permute(0, 3, 1, 2), expected.clamp(0, 1), rtol=0, atol=1e-5)


def test_frames_get_their_share_of_the_detail_that_coding_takes_from_the_moved_portrait(moving_stages):
    decode = moving_stages.decode
    assert decode.config.vae.kept_detail == 0.25
    chunks = [replace(clean(seed, num_frames), moved=moved(seed, num_frames)) for seed, num_frames in ((0, 2), (1, 3))]
    frames = decode.run(chunks)
    for chunk, pixels in zip(chunks, frames, strict=True):
        images = torch.from_numpy(chunk.moved).float() * 2 - 1
        coded = decode.vae.decode(decode.vae.encode(images))
        expected = decode.vae.decode(torch.from_numpy(chunk.latents)) + 0.25 * (images - coded)
        expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        assert np.abs(pixels - expected.numpy()).max() <= 1.01
        [plain] = decode.run([replace(chunk, moved=None)])
        assert np.abs(pixels.astype(int) - plain).mean() > 5


def test_what_lies_beyond_black_and_white_is_cut_off(decode):
    vae = copy.deepcopy(decode.vae)
    vae.decoder.conv_out.weight.mul_(100)
    glaring = DecodeStage(decode.config, vae)
    chunk = clean(0, 2)
    latents = torch.from_numpy(chunk.latents)
    assert vae.decode(latents).abs().max() > 10
    frames = glaring.decode(latents)
    assert frames.min() == 0 and frames.max() == 1
    [pixels] = glaring.run([chunk])
    assert pixels.min() == 0 and pixels.max() == 255


def test_frames_can_be_sent_as_they_are(decode):
    assert decode.decode(torch.from_numpy(clean(0, 2).latents)).is_contiguous()
    assert all(frames.flags.c_contiguous for frames in decode.run([clean(0, 2), clean(1, 3)]))
