"""Reads a video as RGB frames with their real times, makes them square, and writes one with the source's sound.

Counts and rates come from timestamps: headers lie. Called by `stages.animate`, `serving.client` and the tests, so that
all of them see, and hash, the same pixels. No torch, no Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median

import av
import cv2
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from stages.errors import BadVideo
from stages.messages import Pixels

TIME_BASE = Fraction(1, 90_000)
DEFAULT_FRAME_S = 1 / 25
MIN_STEP_S = 1e-3
"""Times that stand still or run backwards are moved on by this, so that every frame keeps a place."""
AUDIO_RATE_HZ = 48_000
SOUND_TOLERANCE = AUDIO_RATE_HZ // 100
"""Samples by which a block of sound may lie off its timestamp."""
MAX_SILENCE = AUDIO_RATE_HZ * 600
"""Samples of silence that one hole in the timestamps may cost, since timestamps can lie too."""


@dataclass(frozen=True)
class TimedFrame:
    """One decoded picture."""

    rgb: Pixels
    """(height, width, 3), upright."""
    time_s: float
    """On the file's own clock; the first frame need not be at 0."""


def read_video(path: str | Path) -> Iterator[TimedFrame]:
    """Every frame of the first video stream in showing order, with strictly increasing times.

    Raises BadVideo: no such file, no video stream, no frame at all, or a file that breaks off.
    """
    num_frames = 0
    last_s: float | None = None
    with _open_input(path) as container:
        for frame in container.decode(container.streams.video[0]):
            last_s = _next_time_s(frame.time, last_s)
            num_frames += 1
            rgb = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
            yield TimedFrame(upright(rgb, frame.rotation), last_s)
    if not num_frames:
        raise BadVideo(f"{path}: not one frame can be decoded: convert it to H.264 in MP4")


def _next_time_s(time_s: float | None, last_s: float | None) -> float:
    if last_s is None:
        return time_s or 0.0
    return last_s + DEFAULT_FRAME_S if time_s is None else max(time_s, last_s + MIN_STEP_S)


def header_num_frames(path: str | Path) -> int | None:
    """The number of frames the header claims: good enough for a progress bar, for nothing else. Raises BadVideo."""
    with _open_input(path) as container:
        return container.streams.video[0].frames or None


def frame_rate(times_s: Sequence[float]) -> float:
    """Frames per second over a list of frame times; 25 where there are fewer than two."""
    if len(times_s) < 2 or times_s[-1] <= times_s[0]:
        return 1 / DEFAULT_FRAME_S
    return (len(times_s) - 1) / (times_s[-1] - times_s[0])


def upright(rgb: Pixels, degrees: float) -> Pixels:
    """The picture turned counterclockwise by `degrees`, a multiple of 90 as cameras write it."""
    num_turns = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, num_turns)) if num_turns else rgb


def square_resize(rgb: Pixels, size_px: int) -> Pixels:
    """Centre square crop, then (size_px, size_px, 3): area-averaged when it shrinks, bilinear when it grows.

    A picture that has the size already comes back unchanged, so doing it twice is doing it once.
    """
    height, width = rgb.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(rgb[top : top + side, left : left + side])
    if side == size_px:
        return square
    method = cv2.INTER_AREA if side > size_px else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(square, (size_px, size_px), interpolation=method), dtype=np.uint8)


class FramesHash:
    """sha256 over RGB frames in their order: what `--json` prints as `frames_sha256`."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, rgb: Pixels) -> None:
        self._hash.update(np.ascontiguousarray(rgb).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class VideoWriter:
    """Writes RGB frames at their own times as H.264 in MP4, with the sound of `audio_from` where that has any.

    Frame times are those of the source file, so the source's rate and the sound's place beside the picture are kept.
    The file is made at the first frame; a writer without frames leaves nothing behind. Use as a context manager.
    """

    def __init__(self, path: str | Path, audio_from: str | Path | None = None):
        self._path = Path(path)
        self._audio_from = audio_from
        self._output: _Output | None = None
        self._pending: TimedFrame | None = None
        self._steps_s: list[float] = []

    def write(self, rgb: Pixels, time_s: float) -> None:
        """Adds a frame that is shown from `time_s` on. Times must increase; all frames must have one size."""
        frame = TimedFrame(rgb, time_s)
        if self._pending is None:
            self._output = _Output(self._path, frame, self._audio_from)
        else:
            self._steps_s.append(time_s - self._pending.time_s)
            self._flush_pending(self._steps_s[-1])
        self._pending = frame

    def close(self) -> None:
        """Ends the file. The last frame lasts as long as the usual one."""
        if self._pending is None or self._output is None:
            return
        self._flush_pending(median(self._steps_s) if self._steps_s else DEFAULT_FRAME_S)
        self._pending = None
        self._output.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _flush_pending(self, duration_s: float) -> None:
        # A frame's duration is known when the next one comes, so the writer stays one frame behind.
        if self._pending is not None and self._output is not None:
            self._output.write(self._pending, duration_s)


class _Output:
    """An open MP4 file: one video stream, at most one audio stream, on one clock that starts with the first of both."""

    def __init__(self, path: Path, first: TimedFrame, audio_from: str | Path | None):
        sound = sound_blocks(audio_from, _sound_start_s(audio_from, first.time_s)) if audio_from is not None else None
        self._next_sound = next(sound, None) if sound is not None else None
        self._sound = sound
        self._origin_s = first.time_s if self._next_sound is None else min(first.time_s, self._next_sound.time_s)
        self._container: OutputContainer = av.open(str(path), "w")
        self._video = _add_video(self._container, first.rgb)
        self._durations: dict[int, int] = {}
        self._audio = None if self._next_sound is None else _add_audio(self._container)

    def write(self, frame: TimedFrame, duration_s: float) -> None:
        picture = av.VideoFrame.from_ndarray(_with_even_sides(frame.rgb), format="rgb24")
        picture.time_base = TIME_BASE
        picture.pts = round((frame.time_s - self._origin_s) / TIME_BASE)
        self._durations[picture.pts] = round(duration_s / TIME_BASE)
        self._write_packets(self._video.encode(picture))
        self._write_sound(until_s=frame.time_s + duration_s)

    def close(self) -> None:
        self._write_packets(self._video.encode(None))
        if self._audio is not None:
            self._container.mux(self._audio.encode(None))
        self._container.close()
        if self._sound is not None:
            self._sound.close()

    def _write_packets(self, packets: Iterable[av.Packet]) -> None:
        for packet in packets:
            # The encoder would write a 24th of a second, and the last packet's duration counts in the file's rate.
            packet.duration = self._durations.pop(packet.pts) if packet.pts is not None else 0
            self._container.mux(packet)

    def _write_sound(self, until_s: float) -> None:
        # Sound goes in beside the picture it belongs to, so that the file can be played while it is read.
        while self._next_sound is not None and self._next_sound.time_s < until_s:
            assert self._audio is not None and self._sound is not None
            block = av.AudioFrame.from_ndarray(self._next_sound.samples, format="fltp", layout="stereo")
            block.sample_rate = AUDIO_RATE_HZ
            block.time_base = Fraction(1, AUDIO_RATE_HZ)
            block.pts = round((self._next_sound.time_s - self._origin_s) * AUDIO_RATE_HZ)
            self._container.mux(self._audio.encode(block))
            self._next_sound = next(self._sound, None)


@dataclass(frozen=True)
class SoundBlock:
    """Some samples of sound."""

    samples: NDArray[np.float32]
    """(2, n) stereo at AUDIO_RATE_HZ."""
    time_s: float
    """Of the first sample, on the file's own clock."""


def sound_blocks(path: str | Path, from_s: float) -> Generator[SoundBlock, None, None]:
    """The sound of a file from `from_s` on, without holes or overlaps: gaps in its timestamps become silence.

    Yields nothing where there is no sound; sound that breaks off ends there.
    """
    position: int | None = None
    for samples, time_s in _raw_sound(path):
        start = round(time_s * AUDIO_RATE_HZ)
        at = max(start, round(from_s * AUDIO_RATE_HZ)) if position is None else position
        # Blocks that are off by less than the tolerance are rounding, not holes.
        off = start - at
        if off > SOUND_TOLERANCE and position is not None:
            samples = np.pad(samples, ((0, 0), (min(off, MAX_SILENCE), 0)))
        elif off < (-SOUND_TOLERANCE if position is not None else 0):
            samples = samples[:, -off:]
        if samples.shape[1]:
            yield SoundBlock(np.ascontiguousarray(samples), at / AUDIO_RATE_HZ)
            position = at + samples.shape[1]


def _raw_sound(path: str | Path) -> Iterator[tuple[NDArray[np.float32], float]]:
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=AUDIO_RATE_HZ)
    with _open_input(path) as container, contextlib.suppress(av.FFmpegError):
        for decoded in container.decode(container.streams.audio[0]) if container.streams.audio else ():
            for block in resampler.resample(decoded):
                if block.time is not None:
                    yield np.asarray(block.to_ndarray(), dtype=np.float32), block.time


def _sound_start_s(path: str | Path, first_frame_s: float) -> float:
    # An output that starts with the source's first frame keeps what sounds before it; one that starts later does not.
    source_first_s = next(read_video(path)).time_s
    return first_frame_s if first_frame_s > source_first_s else -1e9


def _add_video(container: OutputContainer, rgb: Pixels) -> VideoStream:
    height, width = _with_even_sides(rgb).shape[:2]
    stream = container.add_stream("libx264", options={"crf": "18", "preset": "veryfast"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.time_base = TIME_BASE
    return stream


def _add_audio(container: OutputContainer) -> AudioStream:
    return container.add_stream("aac", rate=AUDIO_RATE_HZ, layout="stereo")


def _with_even_sides(rgb: Pixels) -> Pixels:
    # yuv420p halves the colour's sides, so an odd picture repeats its last row or column.
    height, width = rgb.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return rgb
    return np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


@contextlib.contextmanager
def _open_input(path: str | Path) -> Iterator[InputContainer]:
    """An open file that has a video stream. Every error of libav inside becomes BadVideo."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadVideo(f"{path}: there is no video stream in it: give a video file")
            yield container
    except FileNotFoundError:
        raise BadVideo(f"{path}: no such file") from None
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise BadVideo(f"{path}: not a video, or a damaged one ({reason}): convert it to H.264 in MP4") from None
