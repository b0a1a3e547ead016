"""What one call for several sessions costs: `python -m stages.batch_cost [--sizes 1,2,4,8] [--rounds 10] [--json]`.

Each stage works for so many sessions at once, the sizes in turn in every round, so that what else the machine does
touches all of them alike; compared are the medians. The README of the service quotes it; nothing imports it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from stages.pipeline import Stages, load_stages
from stages.portraits import BUNDLED_CLIP, bundled_portraits, load_portrait, read_bundled_portrait
from stages.video import read_video, square_resize

STAGES = ("motion", "denoise", "decode")


def calls(stages: Stages, num_sessions: int) -> dict[str, Callable[[], Any]]:
    """By stage: one call for so many sessions, each with a portrait of its own."""
    size_px, num_frames = stages.config.size_px, stages.config.window.chunk_frames
    pictures = [
        square_resize(frame.rgb, size_px) for _, frame in zip(range(num_frames), read_video(BUNDLED_CLIP), strict=False)
    ]
    frames, names = np.stack(pictures), list(bundled_portraits())
    portraits = [
        load_portrait(read_bundled_portrait(names[number % len(names)]), size_px) for number in range(num_sessions)
    ]
    motions = [stages.motion.open(portrait) for portrait in portraits]
    windows = [
        stages.denoise.open(stages.reference.open(portrait), motion.portrait_tokens, seed)
        for seed, (portrait, motion) in enumerate(zip(portraits, motions, strict=True))
    ]
    moved = [chunk for _, chunk in stages.motion.run(motions, [frames] * num_sessions)]
    answers = stages.denoise.run(windows, moved)
    windows, clean = [state for state, _, _ in answers], [clean for _, clean, _ in answers]
    # The first chunk carries the transition too; from the second one on all are alike.
    started = [state for state, _ in stages.motion.run(motions, [frames] * num_sessions)]
    steady = [chunk for _, chunk in stages.motion.run(started, [frames] * num_sessions)]
    return {
        "motion": lambda: stages.motion.run(started, [frames] * num_sessions),
        "denoise": lambda: stages.denoise.run(windows, steady),
        "decode": lambda: stages.decode.run(clean),
    }


def measure(stages: Stages, sizes: list[int], num_rounds: int) -> dict[str, dict[int, float]]:
    """Median ms of one call, by stage and number of sessions."""
    by_size = {size: calls(stages, size) for size in sizes}
    times_ms: dict[str, dict[int, list[float]]] = {stage: {size: [] for size in sizes} for stage in STAGES}
    for _ in tqdm(range(num_rounds), unit="round", disable=None):
        for stage in STAGES:
            for size in sizes:
                started_s = time.perf_counter()
                by_size[size][stage]()
                times_ms[stage][size].append((time.perf_counter() - started_s) * 1e3)
    return {
        stage: {size: round(statistics.median(values), 2) for size, values in by.items()}
        for stage, by in times_ms.items()
    }


def table(call_ms: dict[str, dict[int, float]]) -> str:
    """The figures for people."""
    lines = [f"{'stage':<10}{'sessions':>10}{'ms a call':>12}{'times one':>12}{'ms a session':>14}"]
    for stage, by_size in call_ms.items():
        one_ms = by_size[min(by_size)] / min(by_size)
        for size, ms in by_size.items():
            lines.append(f"{stage:<10}{size:>10}{ms:>12.1f}{ms / one_ms:>12.2f}{ms / size:>14.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stages.batch_cost", description="What one call for several sessions costs."
    )
    parser.add_argument("--sizes", default="1,2,4,8", help="sessions in a call (default 1,2,4,8)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--weights", default="tiny", help="tiny, or a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as the members")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sizes = sorted({int(size) for size in args.sizes.split(",")})
    if sizes[0] < 1 or args.rounds < 1:
        parser.error("--sizes and --rounds must be 1 or more")
    call_ms = measure(load_stages(args.weights, device=args.device, num_threads=args.threads), sizes, args.rounds)
    print(json.dumps({"call_ms": call_ms}, indent=2) if args.json else table(call_ms))


if __name__ == "__main__":
    main()
