"""The sliding window of one session, as values and free functions (paper, section 3.3; specification, section 10).

A window holds `num_levels` chunks of `chunk_frames` frames, oldest and cleanest first. One denoiser call moves every
chunk one noise level down; the oldest becomes clean and leaves, a new one enters as noised portrait:

    state = open_window(...)                                  # the portrait, noised to all levels but the last
    state, clean, keyframe = run_windows(unet, ...)[0]        # push, one denoiser call, level step, pop
    state = add_keyframe(state, ...)                          # only if `keyframe` is not None, before the next call

Called by `stages.denoise`. Nothing here is hidden on a module: states go in, states come out, and a call may hold
windows of several sessions. The first call's motion also carries the transition from the portrait (`stages.motion`), so
that the tokens and poses of the `num_levels - 1` chunks that are already inside arrive with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from stages.config import WindowConfig
from stages.messages import Floats, Keyframe
from stages.networks.unet import DenoisingUNet, Memory, extend_memory
from stages.schedule import add_noise, frame_fractions, frame_timesteps, signal_fractions, step

MAX_BANK_ENTRIES = 256
"""Beyond the last keyframe the motion bank decides nothing any more, so it need not grow for ever."""


@dataclass(frozen=True)
class WindowState:
    """Everything the denoiser keeps of a session. n = frames inside between calls (`num_transition_frames`)."""

    seed: int
    num_calls: int
    latents: Tensor
    """(n, c, h, w), partly denoised, oldest first."""
    tokens: Tensor
    """(n, T, D) motion tokens of the same frames; empty before the first call."""
    pose: Tensor
    """(n, c0, h, w) pose features of the same frames; empty before the first call."""
    portrait: Tensor
    """(c, h, w) the portrait's latent: new chunks start as this, noised."""
    image_token: Tensor
    """(cross_attention_dim,)."""
    memory: Memory
    """Keys and values of portrait and keyframes."""
    bank: Tensor
    """(m, T · D) motions that are far from one another; the first is the portrait's."""
    num_keyframes: int = 0
    keypoints: Floats | None = None
    """(n, K, 3) that `pose` was made of, and `keyframes` that `memory` was: kept by the stage, for its snapshots."""
    keyframes: tuple[Keyframe, ...] = ()
    picture: Tensor | None = None
    """(3, s, s) the portrait in [0, 1] and, from the first call on, its keypoints (K, 3): only where the canvases show
    the portrait, and for the stage alone."""
    portrait_keypoints: Floats | None = None
    moved: Tensor | None = None
    """(n, 3, s, s) the moved portrait of the frames inside, in halves, where decoded frames get detail of it; None
    before the first call."""


@dataclass(frozen=True)
class Motion:
    """What enters a window with one chunk: tokens (f, T, D), pose features (f, c0, h, w) and, where decoded frames get
    detail of it, the moved portrait (f, 3, s, s)."""

    tokens: Tensor
    pose: Tensor
    moved: Tensor | None = None


@dataclass(frozen=True)
class WindowStep:
    """Result of one call for one session."""

    state: WindowState
    clean: Tensor
    """(chunk_frames, c, h, w) the chunk that left."""
    keyframe: Tensor | None
    """(c, h, w) latent that is to extend the memory before this session's next call."""
    prediction: Tensor
    """(num_frames, c, h, w) the denoiser's raw output; the parity tests read it."""
    moved: Tensor | None = None
    """(chunk_frames, 3, s, s) the moved portrait of the chunk that left, where the window has been given it."""


def chunk_noise(seed: int, position: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of one chunk: a pure function of (seed, position), the same on every device.

    Positions count the chunks of a window's life from 0; the first `num_levels - 1` belong to the transition.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def transition_noise(config: WindowConfig, seed: int, latent_shape: tuple[int, ...]) -> Tensor:
    """(num_transition_frames, c, h, w) noise of the chunks that a new window starts with."""
    shape = (config.chunk_frames, *latent_shape)
    return torch.cat([chunk_noise(seed, position, shape) for position in range(config.num_levels - 1)])


def open_window(
    config: WindowConfig,
    portrait: Tensor,
    image_token: Tensor,
    memory: Memory,
    portrait_tokens: Tensor,
    seed: int,
    noise: Tensor | None = None,
) -> WindowState:
    """A new window: the portrait's latent (c, h, w), noised to every level but the noisiest.

    portrait_tokens (T, D) start the motion bank. `noise` (num_transition_frames, c, h, w) overrides the seed's.
    """
    if noise is None:
        noise = transition_noise(config, seed, tuple(portrait.shape))
    levels = signal_fractions(config)[list(config.timesteps[:-1])].repeat_interleave(config.chunk_frames)
    start = repeat(portrait, "c h w -> n c h w", n=config.num_transition_frames)
    latents = add_noise(start, noise.to(portrait), levels.to(portrait.device))
    return WindowState(
        seed=seed,
        num_calls=0,
        latents=latents,
        tokens=portrait_tokens.new_empty(0, *portrait_tokens.shape),
        pose=portrait.new_empty(0),
        portrait=portrait,
        image_token=image_token,
        memory=memory,
        bank=rearrange(portrait_tokens, "t d -> 1 (t d)"),
    )


def push(config: WindowConfig, state: WindowState, motion: Motion, noise: Tensor | None = None) -> WindowState:
    """The window with one more chunk at the noisiest level: now `num_frames` frames. `noise` overrides the seed's."""
    if noise is None:
        position = state.num_calls + config.num_levels - 1
        noise = chunk_noise(state.seed, position, (config.chunk_frames, *state.portrait.shape))
    noisiest = signal_fractions(config)[config.timesteps[-1], None].to(state.portrait.device)
    start = repeat(state.portrait, "c h w -> n c h w", n=config.chunk_frames)
    entering = add_noise(start, noise.to(state.portrait), noisiest)
    is_first = state.num_calls == 0
    return replace(
        state,
        latents=torch.cat([state.latents, entering]),
        tokens=torch.cat([state.tokens, motion.tokens]),
        pose=motion.pose if is_first else torch.cat([state.pose, motion.pose]),
        moved=motion.moved if state.moved is None or motion.moved is None else torch.cat([state.moved, motion.moved]),
    )


def run_windows(
    unet: DenoisingUNet,
    config: WindowConfig,
    states: Sequence[WindowState],
    motions: Sequence[Motion],
    noise: Sequence[Tensor | None] | None = None,
) -> list[WindowStep]:
    """One denoiser call over the windows of one or several sessions: push, denoise, step, pop."""
    noise = noise or [None] * len(states)
    pushed = [push(config, *parts) for parts in zip(states, motions, noise, strict=True)]
    device = pushed[0].latents.device
    predictions = unet(
        torch.stack([state.latents for state in pushed]),
        frame_timesteps(config, device),
        torch.stack([state.tokens for state in pushed]),
        torch.stack([state.pose for state in pushed]),
        [state.memory for state in pushed],
    )
    now, then = frame_fractions(config, device)
    lowered = [
        step(prediction.float(), state.latents.float(), now, then, config.prediction)[0].to(state.latents.dtype)
        for state, prediction in zip(pushed, predictions, strict=True)
    ]
    return [pop(config, *parts) for parts in zip(pushed, lowered, predictions, strict=True)]


def pop(config: WindowConfig, state: WindowState, lowered: Tensor, prediction: Tensor) -> WindowStep:
    """Takes the oldest chunk, now clean, out of a pushed window and decides whether it gives a keyframe."""
    bank, is_new = update_bank(config, state)
    is_keyframe = is_new and state.num_keyframes < config.max_keyframes
    rest = slice(config.chunk_frames, None)
    after = replace(
        state,
        num_calls=state.num_calls + 1,
        latents=lowered[rest],
        tokens=state.tokens[rest],
        pose=state.pose[rest],
        moved=None if state.moved is None else state.moved[rest],
        bank=bank,
        num_keyframes=state.num_keyframes + is_keyframe,
    )
    left = slice(config.chunk_frames)
    moved = None if state.moved is None else state.moved[left]
    return WindowStep(after, lowered[left], lowered[0] if is_keyframe else None, prediction, moved)


def update_bank(config: WindowConfig, state: WindowState) -> tuple[Tensor, bool]:
    """The motion bank after this call, and whether the oldest frame's motion was far from everything in it."""
    if state.num_calls < config.first_keyframe_call:
        return state.bank, False
    motion = rearrange(state.tokens[:1], "1 t d -> 1 (t d)")
    is_new = bool(bank_distance(motion, state.bank) > config.keyframe_threshold)
    is_full = state.num_keyframes >= config.max_keyframes and len(state.bank) >= MAX_BANK_ENTRIES
    return (torch.cat([state.bank, motion]) if is_new and not is_full else state.bank), is_new


def bank_distance(motion: Tensor, bank: Tensor) -> Tensor:
    """Smallest Euclidean distance of a motion (1, T · D) to the bank (m, T · D)."""
    return (bank.float() - motion.float()).norm(dim=-1).min()


def add_keyframe(state: WindowState, keyframe: Memory) -> WindowState:
    """Extends the memory by a keyframe's keys and values."""
    return replace(state, memory=extend_memory(state.memory, keyframe))
