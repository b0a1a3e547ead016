"""Reads a video as upright RGB frames with their real times, crops them, and writes one with the source's sound.

Counts and rates come from timestamps: headers lie. Called by `stages.animate`, `serving.client` and the tests, so that
all of them see, and hash, the same pixels. No torch, no Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator
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

from stages.errors import BadVideo, UserError
from stages.messages import Pixels

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Ending of the file's name to libav's name of the container; all of them hold H.264 and AAC."""

TIME_BASE = Fraction(1, 90_000)
DEFAULT_FRAME_S = 1 / 25
MIN_STEP_S = 1e-3
"""Times that stand still or run backwards are moved on by this, so that every frame keeps a place."""
AUDIO_RATE_HZ = 48_000
SOUND_TOLERANCE = AUDIO_RATE_HZ // 100
"""Samples by which a block of sound may lie off its timestamp."""
MAX_SILENCE = AUDIO_RATE_HZ * 600
"""Samples of silence that one hole in the timestamps may cost, since timestamps can lie too."""


class BadOutput(UserError):
    """The place of the output cannot be written."""

    code = "bad_out"


@dataclass(frozen=True)
class TimedFrame:
    """One decoded picture."""

    rgb: Pixels
    """(height, width, 3), upright, of square pixels."""
    time_s: float
    """On the file's own clock; the first frame need not be at 0."""


def read_video(path: str | Path) -> Iterator[TimedFrame]:
    """Every frame of the first video stream in showing order, with strictly increasing times.

    Raises BadVideo: no such file, no video stream, no frame at all, or a file that breaks off.
    """
    num_frames = 0
    last_s: float | None = None
    with _open_input(path) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            last_s = _next_time_s(frame.time, last_s)
            num_frames += 1
            rgb = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
            # Pixels have their shape as they are stored, before the picture is turned.
            yield TimedFrame(upright(with_square_pixels(rgb, stream.sample_aspect_ratio), frame.rotation), last_s)
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


def with_square_pixels(rgb: Pixels, aspect: Fraction | None) -> Pixels:
    """The picture as it is meant to look. `aspect`: a pixel's width over its height, None or 0 where nobody knows.

    The side that has more pixels than it shows shrinks, so that no header makes a picture larger.
    """
    if not aspect or aspect == 1:
        return rgb
    height, width = rgb.shape[:2]
    size = (width, max(1, round(height / aspect))) if aspect > 1 else (max(1, round(width * aspect)), height)
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


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


def check_output(out: str | Path, *sources: str | Path) -> None:
    """Raises BadOutput where no video can be written to `out`, or where it would replace one of `sources`.

    To be asked before slow work starts. Leaves nothing on the disk.
    """
    target, ending = Path(os.path.realpath(out)), Path(out).suffix
    folder = target.parent
    if os.path.isdir(target):
        raise BadOutput(f"{out} is a folder: name a file in it, like {Path(out) / 'out.mp4'}")
    if not os.path.isdir(folder):
        fix = f"{folder} is not a folder" if os.path.exists(folder) else f"make the folder {folder} first"
        raise BadOutput(f"{out} cannot be written: {fix}")
    if ending.lower() not in CONTAINERS:
        raise BadOutput(f"{out} is no name of a video that can be written: let it end in {', '.join(CONTAINERS)}")
    for source in sources:
        if os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source):
            raise BadOutput(f"{out} would replace {source}, which is read: choose another name")
    if os.path.exists(target) and not (os.path.isfile(target) and os.access(target, os.W_OK)):
        raise BadOutput(f"{out} exists and may not be replaced: choose another name")
    try:
        # A name may be too long, a file system read-only: only trying tells.
        tempfile.TemporaryFile(dir=folder).close()
        with contextlib.suppress(FileNotFoundError):
            target.stat()
    except OSError as error:
        raise BadOutput(f"{out} cannot be written ({error.strerror or error}): choose another place") from None


class VideoWriter:
    """Writes RGB frames at their own times as H.264, with the sound of `audio_from` where that has any.

    Frame times are those of the source file, so the source's rate and the sound's place beside the picture are kept.
    The video grows in a hidden file beside `path` and takes its place on `close`: nobody meets half a video, and a file
    that was there stays until the new one is whole. A writer without frames leaves nothing behind.

    As a context manager it closes, or discards after an error; with `contextlib.closing` what came before an error is
    kept. Another thread may still be writing when it is closed. Raises BadOutput when the disk does not take it.
    """

    def __init__(self, path: str | Path, audio_from: str | Path | None = None):
        self._path = Path(os.path.realpath(path))
        self._part = self._path.with_name(f".{self._path.stem[:40]}.{secrets.token_hex(4)}.part")
        self._container = CONTAINERS.get(Path(path).suffix.lower(), "mp4")
        self._audio_from = audio_from
        self._output: _Output | None = None
        self._pending: TimedFrame | None = None
        self._steps_s: list[float] = []
        self._is_closed = False
        self._lock = threading.Lock()

    def write(self, rgb: Pixels, time_s: float) -> None:
        """Adds a frame that is shown from `time_s` on. Times must increase; all frames must have one size."""
        frame = TimedFrame(rgb, time_s)
        with self._lock, self._whole_or_nothing():
            if self._is_closed:
                raise ValueError("a frame was written after the end of the video")
            if self._pending is None:
                self._output = _Output(self._part, self._container, frame, self._audio_from)
            else:
                self._steps_s.append(time_s - self._pending.time_s)
                self._flush_pending(self._steps_s[-1])
            self._pending = frame

    def close(self) -> None:
        """Ends the video and puts it in its place. The last frame lasts as long as the usual one."""
        with self._lock, self._whole_or_nothing():
            if self._output is not None and not self._is_closed:
                self._flush_pending(median(self._steps_s) if self._steps_s else DEFAULT_FRAME_S)
                self._output.close()
                self._part.replace(self._path)
            self._is_closed = True

    def discard(self) -> None:
        """Leaves everything as it was before the first frame."""
        with self._lock:
            self._drop()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    @contextlib.contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self._drop()
            reason = error.strerror or error
            raise BadOutput(f"{self._path} cannot be written ({reason}): make room, or choose another place") from None
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(av.FFmpegError, OSError):
            if self._output is not None:
                self._output.release()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _flush_pending(self, duration_s: float) -> None:
        # A frame's duration is known when the next one comes, so the writer stays one frame behind.
        if self._pending is not None and self._output is not None:
            self._output.write(self._pending, duration_s)


class _Output:
    """An open video file: a video stream, at most one audio stream, on one clock that starts with the first of both."""

    def __init__(self, path: Path, container: str, first: TimedFrame, audio_from: str | Path | None):
        sound = sound_blocks(audio_from, _sound_start_s(audio_from, first.time_s)) if audio_from is not None else None
        self._next_sound = next(sound, None) if sound is not None else None
        self._sound = sound
        self._origin_s = first.time_s if self._next_sound is None else min(first.time_s, self._next_sound.time_s)
        self._container: OutputContainer = av.open(str(path), "w", format=container)
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
        self.release()

    def release(self) -> None:
        """Lets go of the files, whatever has been written."""
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
