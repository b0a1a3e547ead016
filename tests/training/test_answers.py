"""What a model shows: in step with the driver, repeatable, and the same as the in-process pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.config import ModelConfig
from stages.messages import Pixels
from stages.pipeline import Stages, load_stages
from stages.pipeline import animate as pipeline_animate
from stages.weights import save_folder
from training.answers import answer, answer_shuffled, in_chunks, model_fps, reconstruct, stream
from training.trials import make_cast
from training.world import render


@pytest.fixture(scope="module")
def stages(config: ModelConfig, face_finders, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    folder, networks = tmp_path_factory.mktemp("weights"), face_finders(1)
    with torch.no_grad():
        for name in ("motion_encoder", "denoising_unet"):  # some of whose layers start at zero
            for parameter in networks[name].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    save_folder(folder, config, {name: network.state_dict() for name, network in networks.items()})
    return load_stages(str(folder), device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def drawn(config: ModelConfig) -> tuple[Pixels, Pixels, Pixels]:
    """A portrait and eight frames of each of two drivers."""
    first, second = make_cast(0, 0, 8), make_cast(0, 1, 8)
    portrait = render(first.person, first.rest, config.size_px)
    frames = [np.stack([render(c.driver, m, config.size_px) for m in c.driving]) for c in (first, second)]
    return portrait, frames[0], frames[1]


def test_the_answer_has_a_frame_per_driving_frame_and_repeats(stages: Stages, drawn: tuple[Pixels, Pixels, Pixels]):
    portrait, driving, _ = drawn
    first, again, other = (answer(stages, portrait, driving, seed) for seed in (3, 3, 4))
    assert first.shape == driving.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_answer_is_the_pipelines_without_the_transition(stages: Stages, drawn: tuple[Pixels, Pixels, Pixels]):
    portrait, driving, _ = drawn
    window = stages.config.window
    padded = np.concatenate([driving, np.repeat(driving[-1:], window.num_transition_frames, 0)])
    pipeline = np.concatenate(list(pipeline_animate(stages, portrait, in_chunks(stages, padded), 3)))
    assert np.array_equal(answer(stages, portrait, driving, 3), pipeline[window.num_transition_frames :])


def test_a_stream_is_answered_chunk_by_chunk(stages: Stages, drawn: tuple[Pixels, Pixels, Pixels]):
    portrait, driving, _ = drawn
    asked: list[int] = []

    def chunks():
        for chunk in in_chunks(stages, driving):
            asked.append(len(chunk))
            yield chunk

    answers = stream(stages, portrait, chunks(), 0)
    next(answers)
    assert len(asked) == stages.config.window.num_levels
    assert len([1 for _ in answers]) == len(driving) // stages.config.window.chunk_frames - 1


def test_shuffling_with_the_same_driver_changes_nothing(stages: Stages, drawn: tuple[Pixels, Pixels, Pixels]):
    portrait, driving, other = drawn
    own = answer(stages, portrait, driving, 0)
    assert np.array_equal(answer_shuffled(stages, portrait, driving, driving, 0), own)
    assert not np.array_equal(answer_shuffled(stages, portrait, driving, other, 0), own)


def test_reconstruction_does_not_depend_on_the_batch(stages: Stages, drawn: tuple[Pixels, Pixels, Pixels]):
    frames = drawn[1]
    together, parts = reconstruct(stages, frames, 8), reconstruct(stages, frames, 3)
    assert together.shape == frames.shape
    assert np.abs(together.astype(int) - parts).max() <= 1


def test_model_fps_is_a_rate_and_leaves_the_threads_as_they_were(stages: Stages, drawn: tuple[Pixels, Pixels, Pixels]):
    portrait, driving, _ = drawn
    before = torch.get_num_threads()
    assert model_fps(stages, portrait, driving) > 0
    assert torch.get_num_threads() == before
