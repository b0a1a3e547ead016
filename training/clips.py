"""Samples of training clips: which frames are picked, in what order, and how they become batches. No torch, no Ray.

The order is a pure function of (seed, epoch, rank, world size, position), so that a run resumes at any batch.
`plain_batches` is the plain loop in the calling process; `training.loading` yields the same batches, bit for bit,
decoded by Ray Data tasks. A bad sample is named in its batch's `bad` and replaced by the next good pick of its rank.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from fractions import Fraction
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from stages.errors import UserError
from stages.messages import Floats, Pixels
from training.layout import BadData, Clip, Manifest, Truth, read_boxes, read_truth, video_path
from training.motion import Motion

NUM_MOTIONS = len(fields(Motion))
NUM_KEYPOINTS = 21
NUM_BOXES = 4
ORDER, FRAMES = 1, 2
"""Tell the two uses of a (seed, epoch) apart."""
logger = logging.getLogger(__name__)


class BadClip(UserError):
    """A clip that gives no sample. `code` is the reason that is counted."""

    code = "bad_clip"


@dataclass(frozen=True)
class Sampling:
    """How frames of a clip make a sample."""

    num_frames: int
    """Target frames per sample, without the reference frame."""
    kind: Literal["spread", "run"]
    """spread: independent random frames. run: frames of one run, the reference being frame 0 of the clip."""
    stride: int = 1
    """run: frames of the clip from one frame to the next; evenly less where the clip is shorter."""
    margin: int = 0
    """spread: frames between the reference and every other, in clips of more than 2 · margin + 4 frames."""
    portrait_first: float = 0.5
    """spread: share of samples whose reference is frame 0."""


@dataclass(frozen=True)
class Pick:
    """Frames of one clip; they may lie beyond the end of a clip that is too short for the sampling."""

    clip: int
    """Index into the manifest."""
    frames: tuple[int, ...]
    """The first is the reference."""


@dataclass(frozen=True)
class Sample:
    """What one pick decodes to; n = 1 + num_frames, s = the manifest's size."""

    pixels: Pixels
    """(n, s, s, 3)."""
    boxes: NDArray[np.int32]
    """(n, 4, 4)."""
    motions: Floats
    """(n, 14)."""
    canonical: Floats
    """(21, 3)."""
    clip: int
    person: int = -1
    """Seed of a drawn person; -1 for filmed clips."""


@dataclass(frozen=True)
class Batch:
    """b samples of n = 1 + num_frames frames, the first of each being the reference."""

    pixels: Pixels
    """(b, n, s, s, 3)."""
    boxes: NDArray[np.int32]
    """(b, n, 4, 4): face, left eye, right eye, mouth; x1, y1, x2, y2, exclusive."""
    motions: Floats
    """(b, n, 14) in the order of `training.motion.Motion`; NaN for filmed clips."""
    canonical: Floats
    """(b, 21, 3); NaN for filmed clips."""
    clips: NDArray[np.int64]
    """(b,) indices into the manifest."""
    bad: tuple[tuple[str, str], ...] = ()
    """Name and reason of every clip that was tried for this batch in vain."""
    people: NDArray[np.int64] | None = None
    """(b,) seeds of drawn people, -1 for filmed clips: what the world can say more of them."""


def check_drawn(batch: Batch, who: str, mend: str) -> None:
    """Raises BadData where `who` asks a filmed clip for what only the world knows; `mend` says what to do."""
    if np.isnan(batch.motions).any() or np.isnan(batch.canonical).any():
        raise BadData(f"{who} needs exact poses, which filmed clips do not have: {mend} (`python -m training.draw`)")


def epoch_order(num_clips: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(num_clips,) the order in which an epoch visits the clips."""
    return np.random.default_rng([seed, epoch, ORDER]).permutation(num_clips)


def picks(
    manifest: Manifest, sampling: Sampling, seed: int, rank: int, world_size: int, start: int = 0
) -> Iterator[Pick]:
    """What one rank trains on, from its sample number `start` on, without end.

    All ranks together visit every clip once an epoch, but for a remainder smaller than `world_size` that changes from
    epoch to epoch. Which frames a clip shows depends on (seed, epoch, clip) alone. Raises BadData where there are more
    workers than clips.
    """
    num_clips = len(manifest.clips)
    per_epoch = num_clips // world_size
    if not per_epoch:
        raise BadData(f"{num_clips} clips are too few for {world_size} workers: add clips or use fewer workers")
    first_epoch, skipped = divmod(start, per_epoch)
    for epoch in count(first_epoch):
        own = epoch_order(num_clips, seed, epoch)[rank::world_size][:per_epoch]
        for clip in own[skipped:].tolist():
            rng = np.random.default_rng([seed, epoch, FRAMES, clip])
            yield Pick(clip, pick_frames(sampling, manifest.clips[clip].num_frames, rng))
        skipped = 0


def pick_frames(sampling: Sampling, clip_frames: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The reference and `num_frames` frames of a clip. Frames beyond its end mean that the clip is too short."""
    choose = {"spread": _spread, "run": _run}[sampling.kind]
    return choose(sampling, clip_frames, rng)


def _spread(sampling: Sampling, clip_frames: int, rng: np.random.Generator) -> tuple[int, ...]:
    numbers = np.arange(max(clip_frames, 2))
    reference = 0 if rng.random() < sampling.portrait_first else int(rng.integers(len(numbers)))
    margin = sampling.margin if clip_frames > 2 * sampling.margin + 4 else 0
    allowed = numbers[np.abs(numbers - reference) >= max(margin, 1)]
    chosen = rng.choice(allowed, sampling.num_frames, replace=len(allowed) < sampling.num_frames)
    return (reference, *chosen.tolist())


def _run(sampling: Sampling, clip_frames: int, rng: np.random.Generator) -> tuple[int, ...]:
    # Frame 0 is the reference, so that runs lie behind it.
    longest = (sampling.num_frames - 1) * sampling.stride + 1
    span = max(min(longest, clip_frames - 1), sampling.num_frames)
    first = 1 + int(rng.integers(max(clip_frames - span, 1)))
    return (0, *np.linspace(first, first + span - 1, sampling.num_frames).astype(int).tolist())


def decode_frames(path: Path, indices: Sequence[int], min_frames: int = 0, out: Pixels | None = None) -> Pixels:
    """(len(indices), h, w, 3) RGB frames of a video of constant rate, found by their times, in one thread; in `out`, of
    that shape, where it is given.

    Decodes from the nearest keyframe before each. Raises BadClip, its code being `missing_video`, `unreadable_video`
    (also one that breaks off), `too_few_frames` (than the indices or `min_frames` ask for) or `wrong_size`.
    """
    try:
        with av.open(str(path)) as container:
            found = {number: _rgb(frame) for number, frame in _wanted_frames(container, sorted({*indices}), min_frames)}
    except FileNotFoundError:
        raise BadClip(f"{path}: no such file", "missing_video") from None
    except (av.FFmpegError, OSError) as error:
        raise BadClip(f"{path}: damaged, or not a video ({error}): prepare it again", "unreadable_video") from None
    except BadClip as error:
        raise BadClip(f"{path}: {error}", error.code) from None
    if len({rgb.shape for rgb in found.values()}) != 1:
        raise BadClip(f"{path}: its pictures change their size: prepare it again", "wrong_size")
    pictures = [found[number] for number in indices]
    if out is not None and pictures[0].shape != out.shape[1:]:
        raise BadClip(f"{path}: pictures of {pictures[0].shape[:2]} px, not {out.shape[1:3]}", "wrong_size")
    return np.stack(pictures, out=out)


def _wanted_frames(container: InputContainer, wanted: list[int], min_frames: int) -> Iterator[tuple[int, VideoFrame]]:
    if not container.streams.video:
        raise BadClip("there is no video stream in it", "unreadable_video")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    num_frames = max(min_frames, wanted[-1] + 1)
    if stream.frames and stream.frames < num_frames:
        raise BadClip(f"has {stream.frames} frames where {num_frames} are needed", "too_few_frames")
    keyframes = [number for number, entry in enumerate(stream.index_entries) if entry.is_keyframe]
    frames, position = _numbered(container, stream), 0
    for target in wanted:
        before = keyframes[bisect_right(keyframes, target) - 1] if keyframes else 0
        if before > position:
            container.seek((stream.start_time or 0) + round(target / _rate_per_tick(stream)), stream=stream)
            frames = _numbered(container, stream)
        position, frame = next((pair for pair in frames if pair[0] >= target), (target + 1, None))
        if frame is None or position != target:
            raise BadClip(f"breaks off, or skips, at frame {target}", "unreadable_video")
        yield target, frame


def _rate_per_tick(stream: VideoStream) -> Fraction:
    """Frames per unit of the stream's time base."""
    # Of the two, this one is not thrown off by the length of the last frame.
    rate, time_base = stream.base_rate or stream.average_rate, stream.time_base
    if not rate or not time_base:
        raise BadClip("says nothing of its frame rate", "unreadable_video")
    return rate * time_base


def _numbered(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
    rate, start = float(_rate_per_tick(stream)), stream.start_time or 0
    for frame in container.decode(stream):
        if frame.pts is None or frame.is_corrupt:
            raise BadClip("has damaged frames", "unreadable_video")
        yield round((frame.pts - start) * rate), frame


def _rgb(frame: VideoFrame) -> Pixels:
    return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


def load(manifest: Manifest, pick: Pick, out: Pixels | None = None) -> Sample:
    """Decodes a pick, its pixels into `out` (f, s, s, 3) where that is given. Raises BadClip: as `decode_frames`, or
    with code `bad_boxes` or `bad_truth`."""
    clip = manifest.clips[pick.clip]
    if max(pick.frames) >= clip.num_frames:
        raise BadClip(f"{clip.name}: {clip.num_frames} frames are too few for the sampling", "too_few_frames")
    boxes = _boxes(manifest, clip, pick.frames)
    truth = _truth(manifest, clip, pick.frames)
    pixels = decode_frames(video_path(manifest.folder, clip.name), pick.frames, clip.num_frames, out)
    if pixels.shape[1:3] != (manifest.size_px, manifest.size_px):
        raise BadClip(f"{clip.name}: pictures of {pixels.shape[1:3]} px, not {manifest.size_px}", "wrong_size")
    return Sample(pixels, boxes, truth.motions, truth.canonical, pick.clip, truth.person)


def _boxes(manifest: Manifest, clip: Clip, frames: tuple[int, ...]) -> NDArray[np.int32]:
    try:
        parts = np.stack(astuple(read_boxes(manifest.folder, clip.name)), 1)
    except BadData as error:
        raise BadClip(str(error), "bad_boxes") from None
    if len(parts) < clip.num_frames:
        raise BadClip(f"{clip.name}: boxes of {len(parts)} of {clip.num_frames} frames", "bad_boxes")
    boxes = parts[list(frames)]
    faces = boxes[:, 0]
    if faces.min() < 0 or faces.max() > manifest.size_px or (faces[:, 2:] <= faces[:, :2]).any():
        raise BadClip(f"{clip.name}: a face box is empty or leaves the picture", "bad_boxes")
    return boxes


def _truth(manifest: Manifest, clip: Clip, frames: tuple[int, ...]) -> Truth:
    try:
        truth = read_truth(manifest.folder, clip.name)
    except BadData as error:
        raise BadClip(str(error), "bad_truth") from None
    if truth is None:
        shapes = (len(frames), NUM_MOTIONS), (NUM_KEYPOINTS, 3)
        motions, canonical = (np.full(shape, np.nan, np.float32) for shape in shapes)
        return Truth(motions, canonical)
    shapes = truth.motions.shape[1:], truth.canonical.shape
    if len(truth.motions) < clip.num_frames or shapes != ((NUM_MOTIONS,), (NUM_KEYPOINTS, 3)):
        raise BadClip(f"{clip.name}: truth of {truth.motions.shape} and {truth.canonical.shape}", "bad_truth")
    return replace(truth, motions=truth.motions[list(frames)])


Attempt = Sample | tuple[int, BadClip]
"""What became of a pick: its sample, or its clip and what is wrong with that."""


def attempt(manifest: Manifest, pick: Pick, out: Pixels | None = None) -> Attempt:
    """`load`, with what is wrong as a value."""
    try:
        return load(manifest, pick, out)
    except BadClip as error:
        return pick.clip, error


def plain_batches(
    manifest: Manifest,
    sampling: Sampling,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    start_batch: int = 0,
) -> Iterator[Batch]:
    """One rank's batches from `start_batch` on, without end, decoded here. Raises BadData as `batches` does."""

    def own_picks(start: int) -> Iterator[Pick]:
        return picks(manifest, sampling, seed, rank, world_size, start)

    start = start_batch * batch_size
    attempts = (attempt(manifest, pick) for pick in own_picks(start))
    return batches(manifest, attempts, own_picks, batch_size, start)


def batches(
    manifest: Manifest,
    attempts: Iterable[Attempt],
    picks_from: Callable[[int], Iterator[Pick]],
    batch_size: int,
    start: int,
) -> Iterator[Batch]:
    """Batches of the attempts at picks number `start`, `start + 1`, …; bad ones are replaced and logged once a clip.

    The replacement of pick number i is the first good one of `picks_from(i + 1)`, decoded here: a rule that needs no
    memory, so that a resumed run makes the same batches. Raises BadData once more than half of all clips are bad.
    """
    known: set[int] = set()

    def good(number: int, first: Attempt, bad: list[tuple[str, str]]) -> Sample:
        others = (attempt(manifest, pick) for pick in picks_from(number + 1))
        for tried in chain([first], others):
            if isinstance(tried, Sample):
                return tried
            bad.append(_note(manifest, *tried, known))
        raise AssertionError("picks have no end")

    numbered = enumerate(attempts, start)
    while group := list(islice(numbered, batch_size)):
        bad: list[tuple[str, str]] = []
        yield _batch([good(number, tried, bad) for number, tried in group], bad)


def _note(manifest: Manifest, clip: int, error: BadClip, known: set[int]) -> tuple[str, str]:
    name = manifest.clips[clip].name
    if clip not in known:
        known.add(clip)
        logger.warning("clip %s is replaced by another one (%s): %s", name, error.code, error)
    if 2 * len(known) > len(manifest.clips):
        raise BadData(f"{len(known)} of the {len(manifest.clips)} clips are bad: prepare them again. The last: {error}")
    return name, error.code


def _batch(samples: list[Sample], bad: list[tuple[str, str]]) -> Batch:
    return Batch(
        np.stack([sample.pixels for sample in samples]),
        np.stack([sample.boxes for sample in samples]),
        np.stack([sample.motions for sample in samples]),
        np.stack([sample.canonical for sample in samples]),
        np.array([sample.clip for sample in samples], np.int64),
        tuple(bad),
        np.array([sample.person for sample in samples], np.int64),
    )
