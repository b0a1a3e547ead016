"""What a model shows in a trial, through the stages' public methods, one session in one process.

Called by `training.evaluate`. k = driving frames, a multiple of `chunk_frames`; pictures are uint8 (k, s, s, 3).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from stages.images import signed
from stages.messages import CleanChunk, MotionChunk, MotionState, Pixels
from stages.pipeline import Stages


def motions_of(stages: Stages, opened: MotionState, chunks: Iterable[Pixels]) -> Iterator[MotionChunk]:
    """The motion stage's answer to every chunk of driving frames; the first also carries the transition."""
    state = opened
    for frames in chunks:
        [(state, motion)] = stages.motion.run([state], [frames])
        yield motion


def frames_of(
    stages: Stages, portrait: Pixels, opened: MotionState, motions: Iterable[MotionChunk], seed: int
) -> Iterator[Pixels]:
    """The decoded chunk for every chunk of motion; the first `num_levels - 1` are the transition."""
    window = stages.denoise.open(stages.reference.open(portrait), opened.portrait_tokens, seed)
    for motion in motions:
        [(window, clean, keyframe)] = stages.denoise.run([window], [motion])
        if keyframe is not None:
            window = stages.denoise.add_keyframe(window, stages.reference.keyframe(keyframe))
        yield stages.decode.run([clean])[0]


def stream(stages: Stages, portrait: Pixels, chunks: Iterable[Pixels], seed: int) -> Iterator[Pixels]:
    """One decoded chunk per driving chunk, in step with it: chunk n answers driving chunk n, the transition is dropped.

    The last chunks repeat the last driving frame, so that everything inside the window comes out.
    """
    opened = stages.motion.open(portrait)
    decoded = frames_of(stages, portrait, opened, motions_of(stages, opened, _with_tail(stages, chunks)), seed)
    yield from _without_transition(stages, decoded)


def answer(stages: Stages, portrait: Pixels, driving: Pixels, seed: int) -> Pixels:
    """The portrait (s, s, 3), moved by the driving frames."""
    return np.concatenate(list(stream(stages, portrait, in_chunks(stages, driving), seed)))


def answer_shuffled(stages: Stages, portrait: Pixels, driving: Pixels, other: Pixels, seed: int) -> Pixels:
    """As `answer`, but only the head's pose is the driver's: the motion tokens are those of another driver's frames."""
    opened = stages.motion.open(portrait)
    own, others = (tailed_motions(stages, opened, frames) for frames in (driving, other))
    swapped = (replace(motion, tokens=lent.tokens, moved=None) for motion, lent in zip(own, others, strict=True))
    return answer_motions(stages, portrait, opened, swapped, seed)


def tailed_motions(stages: Stages, opened: MotionState, driving: Pixels) -> list[MotionChunk]:
    """The motion of driving frames, and as much more of the last as `answer_motions` needs."""
    return list(motions_of(stages, opened, _with_tail(stages, in_chunks(stages, driving))))


def answer_motions(
    stages: Stages, portrait: Pixels, opened: MotionState, motions: Iterable[MotionChunk], seed: int
) -> Pixels:
    """As `answer`, but with the motion given (`tailed_motions`)."""
    return np.concatenate(list(_without_transition(stages, frames_of(stages, portrait, opened, motions, seed))))


def in_chunks(stages: Stages, frames: Pixels) -> Iterator[Pixels]:
    """Frames (k, s, s, 3) in chunks of `chunk_frames`."""
    size = stages.config.window.chunk_frames
    return (frames[start : start + size] for start in range(0, len(frames), size))


def _with_tail(stages: Stages, chunks: Iterable[Pixels]) -> Iterator[Pixels]:
    last = None
    for chunk in chunks:
        last = chunk[-1:]
        yield chunk
    if last is not None:
        yield from [np.repeat(last, stages.config.window.chunk_frames, 0)] * (stages.config.window.num_levels - 1)


def _without_transition(stages: Stages, decoded: Iterator[Pixels]) -> Iterator[Pixels]:
    for index, frames in enumerate(decoded):
        if index >= stages.config.window.num_levels - 1:
            yield frames


@torch.inference_mode()
def reconstruct(stages: Stages, frames: Pixels, batch: int = 8) -> Pixels:
    """Frames through the autoencoder alone: no denoiser can do better."""
    parameter = next(stages.reference.vae.parameters())
    decoded = []
    for start in range(0, len(frames), batch):
        latents = stages.reference.vae.encode(signed(frames[start : start + batch]).to(parameter))
        decoded += stages.decode.run([CleanChunk(latents.float().cpu().numpy())])
    return np.concatenate(decoded)


def model_fps(stages: Stages, portrait: Pixels, driving: Pixels, num_threads: int = 2, num_warm: int = 3) -> float:
    """Frames a second of motion, denoise and decode in sequence: `chunk_frames` over the median chunk's seconds.

    The first `num_warm` chunks do not count. Keyframes are encoded between the chunks and not counted either.
    """
    seconds = []
    with _threads(num_threads):
        state = stages.motion.open(portrait)
        window = stages.denoise.open(stages.reference.open(portrait), state.portrait_tokens, 0)
        for frames in in_chunks(stages, driving):
            start_s = time.perf_counter()
            [(state, motion)] = stages.motion.run([state], [frames])
            [(window, clean, keyframe)] = stages.denoise.run([window], [motion])
            stages.decode.run([clean])
            seconds.append(time.perf_counter() - start_s)
            if keyframe is not None:
                window = stages.denoise.add_keyframe(window, stages.reference.keyframe(keyframe))
    return stages.config.window.chunk_frames / float(np.median(seconds[min(num_warm, len(seconds) - 1) :]))


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
