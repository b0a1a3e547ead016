"""`python -m stages.animate --portrait P --driving V --out O.mp4`: a video drives a portrait, in one process.

The algorithm is the live one (specification, section 10); the transition from the portrait is dropped and the end is
filled (`stages.chunks`), so that output frame k belongs to driving frame k. The client with `--lossless --codec raw`
gives the same frames through the server.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stages.chunks import flush_indices, num_flush_history, num_real_frames, source_chunk
from stages.config import WindowConfig
from stages.errors import UserError
from stages.messages import Pixels
from stages.pipeline import Stages, animate, load_stages
from stages.portraits import load_portrait, read_portrait
from stages.video import (
    FramesHash,
    TimedFrame,
    VideoWriter,
    check_output,
    header_num_frames,
    read_video,
    square_resize,
)

MAX_SEED = 2**32 - 1
"""As in the protocol, so that every seed means the same to both tools."""


def driving_chunks(frames: Iterable[Pixels], window: WindowConfig) -> Iterator[Pixels]:
    """Frames (s, s, 3) in chunks (chunk_frames, s, s, 3), the end filled so that every frame's output is made."""
    history: deque[Pixels] = deque(maxlen=num_flush_history(window.chunk_frames, window.num_levels))
    num_frames, pending = 0, []
    for frame in frames:
        num_frames += 1
        history.append(frame)
        pending.append(frame)
        if len(pending) == window.chunk_frames:
            yield np.stack(pending)
            pending = []
    if num_frames:
        kept_from = num_frames - len(history)
        indices = flush_indices(num_frames, window.chunk_frames, window.num_levels)
        filled = pending + [history[index - kept_from] for index in indices]
        yield from (np.stack(filled[i : i + window.chunk_frames]) for i in range(0, len(filled), window.chunk_frames))


def animate_video(stages: Stages, portrait: Pixels, frames: Iterable[TimedFrame], seed: int) -> Iterator[TimedFrame]:
    """One output frame per driving frame, with the driving frame's time. portrait and outputs as in `animate`."""
    window = stages.config.window
    times_s: deque[float] = deque()
    num_frames = 0

    def pictures() -> Iterator[Pixels]:
        nonlocal num_frames
        for frame in frames:
            num_frames += 1
            times_s.append(frame.time_s)
            yield square_resize(frame.rgb, stages.config.size_px)

    for result, decoded in enumerate(animate(stages, portrait, driving_chunks(pictures(), window), seed)):
        chunk = source_chunk(result, window.num_levels)
        if chunk is None:
            continue
        for rgb in decoded[: num_real_frames(chunk, num_frames, window.chunk_frames)]:
            yield TimedFrame(rgb, times_s.popleft())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole job; returns the report that `--json` prints. Raises UserError; then no output is there."""
    check_output(options.out, options.driving, options.portrait)
    total = header_num_frames(options.driving)
    picture = read_portrait(options.portrait)
    stages = load_stages(options.weights, device=options.device, num_threads=options.threads)
    portrait = load_portrait(picture, stages.config.size_px)
    frames = islice(read_video(options.driving), options.frames)
    digest, num_frames, started_s = FramesHash(), 0, time.perf_counter()
    limit = min(filter(None, (total, options.frames)), default=None)
    with VideoWriter(options.out, audio_from=options.driving) as writer, tqdm(total=limit, unit="frame") as bar:
        for frame in animate_video(stages, portrait, frames, options.seed):
            writer.write(frame.rgb, frame.time_s)
            digest.update(frame.rgb)
            num_frames += 1
            bar.update()
    seconds = time.perf_counter() - started_s
    return {
        "out": str(options.out),
        "frames": num_frames,
        "seconds": round(seconds, 2),
        "fps": round(num_frames / seconds, 2),
        "seed": options.seed,
        "frames_sha256": digest.hexdigest(),
    }


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m stages.animate", description="A video drives a portrait.")
    result.add_argument("--portrait", required=True, help="picture file, or the name of a bundled portrait")
    result.add_argument("--driving", required=True, type=Path, help="video of the person who moves it")
    result.add_argument("--out", required=True, type=Path, help="video to write: .mp4, .m4v, .mov or .mkv")
    result.add_argument("--weights", default="tiny", help="weights folder, ours or the official one (default: tiny)")
    result.add_argument("--seed", type=_whole_number(0, MAX_SEED), default=0, help="of the noise (default 0)")
    result.add_argument("--frames", type=_whole_number(1), help="at most so many driving frames")
    result.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    result.add_argument(
        "--threads", type=_whole_number(0), default=0, help="torch threads (default 0: as many as a server's members)"
    )
    result.add_argument("--json", action="store_true", help="print the report as JSON")
    return result


def _whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """What reads an option's text; argparse shows the sentence of its error."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest or (highest is not None and number > highest):
            limits = f"{lowest} or more" if highest is None else f"from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"give a whole number, {limits}, not {text!r}")
        return number

    return read


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    try:
        report = run(options)
    except UserError as error:
        print(f"error ({error.code}): {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{report['out']}: {report['frames']} frames, {report['fps']} a second, sha256 {report['frames_sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
