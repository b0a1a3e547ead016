"""The noise schedule: one timestep per frame, noise and clean latents as two names for one prediction."""

import math
from itertools import pairwise

import pytest
import torch

from stages.config import WindowConfig
from stages.schedule import add_noise, frame_fractions, frame_timesteps, signal_fractions, step

CONFIG = WindowConfig(chunk_frames=2, timesteps=(0, 300, 650))


def exact_fraction(config: WindowConfig, timestep: int) -> float:
    first, last = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    return math.prod(1 - (first + (last - first) * i / 999) ** 2 for i in range(timestep + 1))


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean latents and noise of a window's six frames."""
    torch.manual_seed(0)
    return torch.randn(6, 3, 4, 5), torch.randn(6, 3, 4, 5)


@pytest.mark.parametrize("config", [WindowConfig(), WindowConfig(beta_start=4.25e-05, beta_end=0.001)])
def test_fractions_are_products_over_a_scaled_linear_schedule(config):
    fractions = signal_fractions(config)
    assert fractions.shape == (1000,) and fractions.dtype == torch.float32
    for timestep in (0, 1, 333, 666, 999):
        assert fractions[timestep].item() == pytest.approx(exact_fraction(config, timestep), rel=1e-5)


def test_fractions_of_the_official_levels():
    levels = signal_fractions(WindowConfig())[[0, 333, 666, 999]]
    assert levels.tolist() == pytest.approx([0.99915, 0.446817, 0.0376411, 2.30013e-4], rel=1e-5)


def test_every_frame_of_a_chunk_has_its_chunks_level():
    assert frame_timesteps(CONFIG).tolist() == [0, 0, 300, 300, 650, 650]
    now, then = frame_fractions(CONFIG)
    assert torch.equal(now, signal_fractions(CONFIG)[[0, 0, 300, 300, 650, 650]])
    assert torch.equal(then, torch.tensor([1.0, 1.0, *signal_fractions(CONFIG)[[0, 0, 300, 300]]]))


def test_noise_is_added_by_the_square_roots_of_both_shares(latents):
    clean, noise = latents
    fractions = torch.tensor([1.0, 0.0, 0.25, 0.5, 0.64, 0.9])
    noisy = add_noise(clean, noise, fractions)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[1], noise[1])
    torch.testing.assert_close(noisy[2], 0.5 * clean[2] + math.sqrt(0.75) * noise[2])
    torch.testing.assert_close(noisy[4], 0.8 * clean[4] + 0.6 * noise[4])


def test_one_fraction_serves_all_frames(latents):
    clean, noise = latents
    assert torch.equal(add_noise(clean, noise, torch.tensor([0.3])), add_noise(clean, noise, torch.full((6,), 0.3)))


def test_noise_is_added_in_the_latents_precision(latents):
    clean, noise = (part.half() for part in latents)
    assert add_noise(clean, noise, torch.tensor([0.3])).dtype == torch.float16


def test_both_kinds_of_prediction_give_the_same_step(latents):
    clean, noise = latents
    now, then = frame_fractions(CONFIG)
    noisy, expected = add_noise(clean, noise, now), add_noise(clean, noise, then)
    for kind, prediction in (("epsilon", noise), ("sample", clean)):
        lowered, found = step(prediction, noisy, now, then, kind)
        torch.testing.assert_close(lowered, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-5)


def test_a_wrong_prediction_of_either_kind_gives_the_same_wrong_step(latents):
    torch.manual_seed(1)
    noisy, prediction = latents[0], torch.randn(6, 3, 4, 5)
    now, then = (part[:, None, None, None] for part in frame_fractions(CONFIG))
    clean = (noisy - (1 - now).sqrt() * prediction) / now.sqrt()
    from_noise, from_clean = (
        step(value, noisy, now.flatten(), then.flatten(), kind)[0]
        for value, kind in ((prediction, "epsilon"), (clean, "sample"))
    )
    torch.testing.assert_close(from_noise, from_clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_the_last_level_returns_the_clean_latents_themselves(latents, kind):
    prediction, noisy = latents
    now, then = frame_fractions(CONFIG)
    lowered, clean = step(prediction, noisy, now, then, kind)
    assert torch.equal(lowered[:2], clean[:2])
    assert not torch.allclose(lowered[2:], clean[2:], atol=0.1)


def test_true_noise_leads_down_all_levels_to_the_clean_latents(latents):
    clean, noise = latents
    levels = [*signal_fractions(CONFIG)[[650, 300, 0]].split(1), torch.ones(1)]
    x = add_noise(clean, noise, levels[0])
    for now, then in pairwise(levels):
        x, _ = step(noise, x, now, then, "epsilon")
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)


def test_frames_do_not_influence_each_other(latents):
    prediction, noisy = latents
    now, then = frame_fractions(CONFIG)
    together = step(prediction, noisy, now, then, "epsilon")
    for frame in range(6):
        part = slice(frame, frame + 1)
        alone = step(prediction[part], noisy[part], now[part], then[part], "epsilon")
        assert torch.equal(alone[0], together[0][part]) and torch.equal(alone[1], together[1][part])
