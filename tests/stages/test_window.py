"""The sliding window with a denoiser that knows the answer, and with the small one for what a real one may change."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from stages.config import WindowConfig
from stages.networks.unet import LayerMemory, attention_names, project_memory
from stages.schedule import signal_fractions
from stages.window import (
    MAX_BANK_ENTRIES,
    Motion,
    WindowState,
    add_keyframe,
    bank_distance,
    chunk_noise,
    open_window,
    pop,
    push,
    run_windows,
    transition_noise,
    update_bank,
)

CONFIG = WindowConfig(chunk_frames=2, timesteps=(0, 300, 650), keyframe_threshold=4.0, first_keyframe_call=2)
WIDE = replace(CONFIG, chunk_frames=5)
LATENT = (12, 6, 6)


@dataclass(frozen=True)
class Oracle:
    """A denoiser that knows the clean latents of every frame: a function of its motion tokens (or the portrait)."""

    config: WindowConfig
    portrait: Tensor | None = None

    def clean(self, tokens: Tensor) -> Tensor:
        if self.portrait is not None:
            return self.portrait.expand(*tokens.shape[:2], -1, -1, -1)
        return tokens[..., 0, 0, None, None, None].expand(*tokens.shape[:2], *LATENT)

    def __call__(self, latents: Tensor, timesteps: Tensor, tokens: Tensor, pose: Tensor, memories) -> Tensor:
        assert latents.shape[:2] == tokens.shape[:2] == pose.shape[:2] and len(memories) == len(latents)
        clean = self.clean(tokens)
        if self.config.prediction == "sample":
            return clean
        fraction = signal_fractions(self.config)[timesteps, None, None, None]
        return (latents - fraction.sqrt() * clean) / (1 - fraction).sqrt()


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new_window(config: WindowConfig, seed: int = 7, noise: Tensor | None = None, portrait_seed: int = 0) -> WindowState:
    memory = (LayerMemory(torch.zeros(2, 9, 4), torch.zeros(2, 9, 4), torch.zeros(8)),)
    return open_window(
        config,
        portrait=random_tensor(portrait_seed, *LATENT),
        image_token=random_tensor(portrait_seed + 100, 10),
        memory=memory,
        portrait_tokens=random_tensor(portrait_seed + 200, 5, 6),
        seed=seed,
        noise=noise,
    )


def motion(config: WindowConfig, call: int) -> Motion:
    """The motion of a call; every frame's first number is the number of its chunk, -1 in the transition."""
    num_leading = config.num_transition_frames if call == 0 else 0
    tokens = random_tensor(call, num_leading + config.chunk_frames, 5, 6)
    tokens[:, 0, 0] = call
    tokens[:num_leading, 0, 0] = -1
    return Motion(tokens, random_tensor(call + 50, len(tokens), 8, 6, 6))


def run(denoiser, config: WindowConfig, state: WindowState, num_calls: int):
    steps = []
    for call in range(state.num_calls, state.num_calls + num_calls):
        [step] = run_windows(denoiser, config, [state], [motion(config, call)])
        state = step.state
        steps.append(step)
    return steps


def snapshot(state: WindowState) -> WindowState:
    return copy.deepcopy(state)


def assert_same(first: WindowState, second: WindowState) -> None:
    for field in fields(WindowState):
        ours, theirs = getattr(first, field.name), getattr(second, field.name)
        if field.name == "memory":
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        else:
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, field.name


@pytest.mark.parametrize("config", [CONFIG, WIDE])
def test_a_new_window_is_the_portrait_noised_to_every_level_but_the_noisiest(config):
    noise = random_tensor(3, config.num_transition_frames, *LATENT)
    state = new_window(config, noise=noise)
    levels = signal_fractions(config)[list(config.timesteps)]
    assert len(state.latents) == config.num_transition_frames == 2 * config.chunk_frames
    for frame in range(len(state.latents)):
        fraction = levels[frame // config.chunk_frames]
        expected = fraction.sqrt() * state.portrait + (1 - fraction).sqrt() * noise[frame]
        torch.testing.assert_close(state.latents[frame], expected)


def test_a_new_window_knows_the_portraits_motion_and_nothing_else():
    state = new_window(CONFIG)
    assert torch.equal(state.bank, random_tensor(200, 5, 6).reshape(1, 30))
    assert (state.num_calls, state.num_keyframes, len(state.tokens), len(state.pose)) == (0, 0, 0, 0)


@pytest.mark.parametrize("config", [CONFIG, WIDE])
def test_a_chunk_enters_behind_the_others_as_the_noisiest(config):
    state, noise = new_window(config), random_tensor(4, config.chunk_frames, *LATENT)
    pushed = push(config, state, motion(config, 0), noise)
    fraction = signal_fractions(config)[650]
    assert torch.equal(pushed.latents[: len(state.latents)], state.latents)
    entered = pushed.latents[len(state.latents) :]
    torch.testing.assert_close(entered, fraction.sqrt() * state.portrait + (1 - fraction).sqrt() * noise)
    assert len(pushed.latents) == len(pushed.tokens) == len(pushed.pose) == config.num_frames


@pytest.mark.parametrize("config", [CONFIG, WIDE])
def test_between_calls_a_window_lacks_one_chunk(config):
    state = new_window(config)
    for step in run(Oracle(config), config, state, 4):
        assert step.clean.shape == (config.chunk_frames, *LATENT)
        assert step.prediction.shape == (config.num_frames, *LATENT)
        for part in (step.state.latents, step.state.tokens, step.state.pose):
            assert len(part) == config.num_transition_frames
    assert step.state.num_calls == 4


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("chunk_frames", [2, 5])
def test_a_perfect_denoiser_gives_back_the_portrait(prediction, chunk_frames):
    config = replace(CONFIG, prediction=prediction, chunk_frames=chunk_frames)
    state = new_window(config)
    for step in run(Oracle(config, state.portrait), config, state, config.num_levels + 1):
        torch.testing.assert_close(step.clean, state.portrait.expand_as(step.clean), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_the_chunk_that_leaves_entered_one_call_less_than_levels_ago(prediction):
    config = replace(CONFIG, prediction=prediction)
    left = [step.clean for step in run(Oracle(config), config, new_window(config), 6)]
    for clean, chunk in zip(left, [-1, -1, 0, 1, 2, 3], strict=True):
        torch.testing.assert_close(clean, torch.full_like(clean, chunk), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_every_call_moves_every_chunk_one_level_down_along_its_own_noise(prediction):
    config = replace(CONFIG, prediction=prediction)
    noise = random_tensor(3, 6, *LATENT)
    state = new_window(config, noise=noise[:4])
    [step] = run_windows(Oracle(config, state.portrait), config, [state], [motion(config, 0)], [noise[4:]])
    below = signal_fractions(config)[[0, 0, 300, 300], None, None, None]
    expected = below.sqrt() * state.portrait + (1 - below).sqrt() * noise[2:]
    torch.testing.assert_close(step.state.latents, expected, rtol=0, atol=1e-4)


def test_tokens_and_poses_stay_with_their_frames():
    state = new_window(CONFIG)
    steps = run(Oracle(CONFIG), CONFIG, state, 3)
    entered = [motion(CONFIG, call) for call in range(3)]
    assert torch.equal(steps[0].state.tokens, entered[0].tokens[2:])
    assert torch.equal(steps[2].state.tokens, torch.cat([entered[1].tokens, entered[2].tokens]))
    assert torch.equal(steps[2].state.pose, torch.cat([entered[1].pose, entered[2].pose]))


def test_noise_is_standard_normal_and_repeatable():
    noise = chunk_noise(3, 5, (4, 12, 30, 30))
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert torch.equal(noise, chunk_noise(3, 5, (4, 12, 30, 30)))


@pytest.mark.parametrize("seeds", [(0, 1), (2**32, 2**33), (2**63, 2**63 + 1), (2**64 - 2, 2**64 - 1)])
def test_every_seed_and_every_chunk_has_its_own_noise(seeds):
    draws = [chunk_noise(seed, position, (2, 3)) for seed in seeds for position in (0, 1, 2)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 6


def test_noise_depends_on_seed_and_chunk_number_only():
    """Two windows of one seed, with other portraits, motions and pasts, draw the same noise at the same call."""
    quiet = replace(CONFIG, prediction="sample", first_keyframe_call=0, max_keyframes=0)
    first, second = new_window(CONFIG, seed=9), new_window(CONFIG, seed=9, portrait_seed=1)
    second = replace(run(Oracle(quiet), quiet, second, 3)[-1].state, num_calls=5)
    first = replace(first, num_calls=5, tokens=second.tokens + 1, pose=second.pose)
    fraction = signal_fractions(CONFIG)[650]
    drawn = [
        (push(CONFIG, state, motion(CONFIG, call)).latents[-2:] - fraction.sqrt() * state.portrait)
        / (1 - fraction).sqrt()
        for state, call in ((first, 5), (second, 6))
    ]
    torch.testing.assert_close(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[0], chunk_noise(9, 7, (2, *LATENT)))


def test_chunks_of_the_transition_have_the_first_numbers():
    noise = transition_noise(CONFIG, 9, LATENT)
    assert torch.equal(noise, torch.cat([chunk_noise(9, number, (2, *LATENT)) for number in (0, 1)]))
    assert_same(new_window(CONFIG, seed=9), replace(new_window(CONFIG, seed=1, noise=noise), seed=9))


def test_windows_with_other_seeds_differ():
    first, second = new_window(CONFIG, seed=1), new_window(CONFIG, seed=2)
    assert not torch.equal(first.latents, second.latents)
    pushed = [push(CONFIG, state, motion(CONFIG, 0)).latents[-2:] for state in (first, second)]
    assert not torch.equal(*pushed)


def test_given_noise_replaces_the_seeds():
    noise = random_tensor(4, 2, *LATENT)
    states = [new_window(CONFIG, seed=1, portrait_seed=seed) for seed in (0, 1)]
    motions = [motion(CONFIG, 0)] * 2
    own = run_windows(Oracle(CONFIG), CONFIG, states, motions)
    mixed = run_windows(Oracle(CONFIG), CONFIG, states, motions, [None, noise])
    assert torch.equal(own[0].state.latents, mixed[0].state.latents)
    assert not torch.allclose(own[1].state.latents[-2:], mixed[1].state.latents[-2:], atol=0.1)
    [reseeded] = run_windows(Oracle(CONFIG), CONFIG, [replace(states[1], seed=2)], motions[1:], [noise])
    torch.testing.assert_close(reseeded.state.latents, mixed[1].state.latents)


def far_state(config: WindowConfig, distance: float, num_calls: int, num_keyframes: int = 0, num_entries: int = 1):
    """A full window whose oldest frame's motion is `distance` away from the nearest entry of the bank."""
    state = push(config, new_window(config), motion(config, 0))
    bank = torch.arange(num_entries, dtype=torch.float32)[:, None] * 1000 * torch.eye(30)[1]
    tokens = state.tokens.clone()
    tokens[0] = (bank[-1] + distance * torch.eye(30)[0]).reshape(5, 6)
    tokens[1:] = 1e6
    return replace(state, tokens=tokens, bank=bank, num_calls=num_calls, num_keyframes=num_keyframes)


def popped(config: WindowConfig, state: WindowState):
    lowered = random_tensor(8, config.num_frames, *LATENT)
    return lowered, pop(config, state, lowered, lowered)


def test_a_frame_with_a_motion_beyond_the_threshold_becomes_a_keyframe():
    state = far_state(CONFIG, 4.001, num_calls=2)
    lowered, step = popped(CONFIG, state)
    assert torch.equal(step.keyframe, lowered[0])
    assert torch.equal(step.state.bank, torch.stack([state.bank[0], state.tokens[0].flatten()]))
    assert step.state.num_keyframes == 1
    assert torch.equal(step.clean, lowered[:2]) and torch.equal(step.state.latents, lowered[2:])


def test_a_motion_at_the_threshold_is_near():
    _, step = popped(CONFIG, far_state(CONFIG, 4.0, num_calls=2))
    assert step.keyframe is None
    assert (len(step.state.bank), step.state.num_keyframes) == (1, 0)


@pytest.mark.parametrize(("num_calls", "is_keyframe"), [(0, False), (1, False), (2, True), (3, True)])
def test_the_first_calls_add_no_keyframe(num_calls, is_keyframe):
    _, step = popped(CONFIG, far_state(CONFIG, 100, num_calls))
    assert (step.keyframe is not None) == is_keyframe
    assert len(step.state.bank) == 1 + is_keyframe


def test_only_the_nearest_entry_of_the_bank_counts():
    assert bank_distance(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 30.0], [4.0, 0.0], [-40.0, 3.0]])) == 5
    _, step = popped(CONFIG, far_state(CONFIG, 3.9, num_calls=9, num_entries=4))
    assert step.keyframe is None


def test_distances_are_measured_in_full_precision():
    bank, near = torch.full((1, 30), 300.0).half(), torch.full((1, 30), 0.0).half()
    assert bank_distance(near, bank).item() == pytest.approx(300 * 30**0.5)


@pytest.mark.parametrize(("num_keyframes", "is_keyframe"), [(0, True), (2, True), (3, False), (4, False)])
def test_after_the_last_keyframe_the_bank_alone_grows(num_keyframes, is_keyframe):
    _, step = popped(CONFIG, far_state(CONFIG, 100, 9, num_keyframes, num_entries=6))
    assert (step.keyframe is not None) == is_keyframe
    assert step.state.num_keyframes == num_keyframes + is_keyframe
    assert len(step.state.bank) == 7


def test_a_model_without_keyframes_still_fills_its_bank():
    config = replace(CONFIG, max_keyframes=0)
    _, step = popped(config, far_state(config, 100, 9))
    assert step.keyframe is None and len(step.state.bank) == 2


def test_a_full_bank_grows_no_more_once_there_can_be_no_keyframe():
    last_place = far_state(CONFIG, 100, 9, num_keyframes=3, num_entries=MAX_BANK_ENTRIES - 1)
    bank, _ = update_bank(CONFIG, last_place)
    assert len(bank) == MAX_BANK_ENTRIES
    full = far_state(CONFIG, 100, 9, num_keyframes=3, num_entries=MAX_BANK_ENTRIES)
    bank, is_new = update_bank(CONFIG, full)
    assert torch.equal(bank, full.bank) and is_new
    assert popped(CONFIG, full)[1].keyframe is None


def test_keyframes_come_from_real_calls_with_the_motion_that_leaves():
    config = replace(CONFIG, prediction="sample", max_keyframes=2, keyframe_threshold=1e-3)
    steps = run(Oracle(config), config, new_window(config), 6)
    assert [step.keyframe is not None for step in steps] == [False, False, True, True, False, False]
    assert torch.equal(steps[2].keyframe, steps[2].clean[0])
    assert torch.equal(steps[2].state.bank[1], motion(config, 0).tokens[4].flatten())
    assert [len(step.state.bank) for step in steps] == [1, 1, 2, 3, 4, 5]


def test_a_keyframe_extends_the_memory_and_nothing_else():
    state = new_window(CONFIG)
    keyframe = (LayerMemory(torch.ones(2, 4, 4), torch.ones(2, 4, 4), torch.ones(8)),)
    extended = add_keyframe(state, keyframe)
    assert torch.equal(extended.memory[0].keys, torch.cat([state.memory[0].keys, keyframe[0].keys], dim=1))
    assert extended.memory[0].values.shape == (2, 13, 4)
    assert torch.equal(extended.memory[0].constant, torch.zeros(8))
    assert_same(replace(extended, memory=state.memory), state)


def real_window(networks, config, seed: int, num_keyframes: int) -> WindowState:
    """A window of the small model, with as many pictures more in its memory."""
    names = attention_names(config.unet)
    pictures = []
    for number in range(1 + num_keyframes):
        latent, token = random_tensor(seed + number, 1, *LATENT), random_tensor(seed, 10)
        features = networks["reference_unet"](latent, token)
        pictures.append(project_memory(networks["denoising_unet"], names, features, token))
    state = replace(new_window(config.window, seed=seed, portrait_seed=seed), memory=pictures[0])
    for keyframe in pictures[1:]:
        state = add_keyframe(state, keyframe)
    return state


def test_two_sessions_in_one_call_equal_two_single_calls(networks, config):
    """They have memories of different lengths and are at different calls of their lives."""
    unet, window = networks["denoising_unet"], config.window
    young = real_window(networks, config, 20, num_keyframes=0)
    old = run(unet, window, real_window(networks, config, 30, num_keyframes=2), 2)[-1].state
    motions = [motion(window, 0), motion(window, 2)]
    together = run_windows(unet, window, [young, old], motions)
    for state, entering, result in zip((young, old), motions, together, strict=True):
        [alone] = run_windows(unet, window, [state], [entering])
        torch.testing.assert_close(result.prediction, alone.prediction, rtol=0, atol=1e-5)
        torch.testing.assert_close(result.clean, alone.clean, rtol=0, atol=1e-5)
        torch.testing.assert_close(result.state.latents, alone.state.latents, rtol=0, atol=1e-5)
        assert_same(replace(result.state, latents=alone.state.latents), alone.state)


def test_states_that_are_passed_in_stay_as_they_are(networks, config):
    unet, window = networks["denoising_unet"], replace(config.window, keyframe_threshold=1e-6, first_keyframe_call=0)
    state = real_window(networks, config, 20, num_keyframes=1)
    for call in range(3):
        before, entering = snapshot(state), motion(window, call)
        [step] = run_windows(unet, window, [state], [entering])
        add_keyframe(step.state, state.memory)
        assert_same(state, before)
        assert torch.equal(entering.tokens, motion(window, call).tokens)
        assert torch.equal(entering.pose, motion(window, call).pose)
        state = step.state


def test_one_state_can_be_continued_in_two_ways():
    state = run(Oracle(CONFIG), CONFIG, new_window(CONFIG), 2)[-1].state
    first = run(Oracle(CONFIG), CONFIG, state, 2)[-1]
    second = run(Oracle(CONFIG), CONFIG, state, 2)[-1]
    assert torch.equal(first.clean, second.clean)
    assert_same(first.state, second.state)


def test_a_moved_portrait_leaves_with_its_chunk():
    state, left = new_window(CONFIG), []
    for call in range(4):
        entering = motion(CONFIG, call)
        shown = entering.tokens[:, 0, 0, None, None, None].expand(-1, 3, 4, 4).half()
        [step] = run_windows(Oracle(CONFIG), CONFIG, [state], [replace(entering, moved=shown)])
        state = step.state
        assert len(state.moved) == CONFIG.num_transition_frames
        left.append(step.moved)
    for shown, chunk in zip(left, [-1, -1, 0, 1], strict=True):
        assert torch.equal(shown, torch.full((CONFIG.chunk_frames, 3, 4, 4), chunk, dtype=torch.float16))


def test_half_precision_latents_stay_half_but_are_stepped_in_full_precision():
    class HalfOracle(Oracle):
        def __call__(self, *inputs) -> Tensor:
            return super().__call__(*inputs).half()

    config = replace(CONFIG, prediction="sample")
    full = new_window(config)
    halves = {
        name: getattr(full, name).half() for name in ("latents", "tokens", "pose", "portrait", "bank", "image_token")
    }
    state, entering = replace(full, **halves), motion(config, 0)
    half_motion = Motion(entering.tokens.half(), entering.pose.half())
    [step] = run_windows(HalfOracle(config, state.portrait), config, [state], [half_motion])
    assert step.clean.dtype == step.state.latents.dtype == torch.float16
    assert torch.equal(step.clean, state.portrait.expand_as(step.clean))
    pushed = push(config, state, half_motion)
    now, below = signal_fractions(config)[300], signal_fractions(config)[0]
    noise = (pushed.latents[2].float() - now.sqrt() * state.portrait.float()) / (1 - now).sqrt()
    expected = (below.sqrt() * state.portrait.float() + (1 - below).sqrt() * noise).half()
    torch.testing.assert_close(step.state.latents[0], expected, rtol=0, atol=1e-6)
