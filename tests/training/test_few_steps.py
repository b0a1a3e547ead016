"""Few-step sampling with a denoiser that knows the answer, and the people it is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.config import ModelConfig
from stages.networks.unet import DenoisingUNet
from stages.schedule import signal_fractions
from training.few_steps import NUM_FRAMES, Row, figures, markdown, sample, spread_timesteps, stills
from training.measures import l1
from training.phases.animation import AnimationPhase, Scene
from training.recipes import AnimationConfig


class Knowing(DenoisingUNet):
    """Answers with the truth, whatever it is asked, and notes the timesteps."""

    def __init__(self, model: ModelConfig, truth: Tensor):
        super().__init__(model.unet, model.motion_encoder.token_dim)
        self.model, self.truth, self.asked = model, truth, []

    def forward(self, latents, timesteps, motion, pose, memories):
        self.asked.append(int(timesteps[0]))
        if self.model.window.prediction == "sample":
            return self.truth[None]
        signal = signal_fractions(self.model.window)[timesteps[0]]
        return (latents - signal.sqrt() * self.truth) / (1 - signal).sqrt()


def scene_of(config: ModelConfig, num_frames: int) -> Scene:
    portrait = torch.randn(1, *config.latent_shape)
    empty = torch.zeros(1, num_frames, 1)
    return Scene(empty, empty, portrait, empty, empty, (), empty, empty, empty)


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
def test_any_number_of_steps_ends_at_what_the_denoiser_says(config: ModelConfig, prediction: str):
    parts = {
        "pose_guider": replace(
            config.pose_guider,
            shows_portrait=False,
            **{f"{part}_channels": () for part in ("mover", "expression", "depth", "light")},
        ),
        "unet": replace(config.unet, num_bases=0),
        "vae": replace(config.vae, kept_detail=0.0),
        "window": replace(config.window, prediction=prediction),
    }
    model = replace(config, **parts)
    truth = torch.randn(4, *model.latent_shape)
    networks: dict[str, nn.Module] = {"denoising_unet": Knowing(model, truth)}
    phase = AnimationPhase(model, AnimationConfig(), networks)
    for count in (1, 3, 20):
        timesteps = spread_timesteps(count).tolist()
        found = sample(phase, scene_of(model, 4), timesteps, torch.randn(4, *model.latent_shape))
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-2)
        assert networks["denoising_unet"].asked[-count:] == timesteps


def test_timesteps_fall_evenly_from_the_noisiest():
    assert spread_timesteps(1).tolist() == [999]
    assert spread_timesteps(4).tolist() == [999, 666, 333, 0]
    assert len(set(spread_timesteps(20).tolist())) == 20


def test_stills_are_held_out_people_with_the_exact_answer(config: ModelConfig):
    [first, second] = stills(5, 2, config)
    [again] = stills(5, 1, config)
    assert np.array_equal(first.batch.pixels, again.batch.pixels)
    assert first.batch.pixels.shape == (1, 1 + NUM_FRAMES, 64, 64, 3)
    assert first.batch.boxes.shape == (1, 1 + NUM_FRAMES, 4, 4) and first.face_boxes.shape == (NUM_FRAMES, 4)
    assert not np.array_equal(first.batch.canonical, second.batch.canonical)
    perfect = figures([first], [first.truth], lambda a, b: np.array([l1(a, b)]))
    assert perfect["psnr_db"] > 100 and perfect["sharpness"] == 1 and perfect["perceptual"] == 0


def test_the_table_has_a_line_a_row():
    row = {"psnr_db": 21.5, "psnr_face_db": 17.25, "perceptual": 0.125, "sharpness": 0.5}
    assert markdown([Row("after", 4, row), Row("portrait", None, row)]).splitlines()[2:] == [
        "| after | 4 | 21.50 | 17.25 | 0.1250 | 0.500 |",
        "| portrait | – | 21.50 | 17.25 | 0.1250 | 0.500 |",
    ]
