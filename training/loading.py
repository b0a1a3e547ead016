"""Training data through Ray Data: each rank's own picks, decoded by tasks. Called by `training.run` in each worker.

`ray_batches` yields the batches of `training.clips.plain_batches`, bit for bit and in the same order, whatever pace the
tasks keep. Each rank runs datasets of its own over the metadata of its picks, since Ray's splitting of one dataset over
ranks is not repeatable. With several nodes the data folder lies on shared storage.

`python -m training.loading DATA` measures both loops on a folder: frames per second, and CPU time per frame of all
processes that take part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ExecutionResources, TaskPoolStrategy
from tqdm import tqdm

from stages.errors import UserError
from stages.messages import Pixels
from training.clips import (
    NUM_BOXES,
    NUM_KEYPOINTS,
    NUM_MOTIONS,
    Attempt,
    BadClip,
    Batch,
    Pick,
    Sample,
    Sampling,
    attempt,
    batches,
    picks,
    plain_batches,
)
from training.layout import Clip, Manifest, read_manifest

BLOCK_BYTES = 48 << 20
"""Pixels that one task decodes: enough that a task's own cost vanishes, and below Ray Data's limit for a block."""
MAX_BLOCK_PICKS = 64
BLOCKS_PER_DATASET = 512
PARTS = ("pixels", "boxes", "motions", "canonical", "person")
Columns = dict[str, NDArray[Any]]


def ray_batches(
    manifest: Manifest,
    sampling: Sampling,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    start_batch: int = 0,
    num_cpus_per_task: float = 0.5,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """One rank's batches from `start_batch` on, without end, decoded by Ray Data tasks ahead of their use.

    At most `prefetch` tasks decode at a time, on CPUs that nobody else holds: leave at least `num_cpus_per_task` free
    beside the workers, or loading waits for ever. About 48 MiB of pixels come from one task. Raises BadData as
    `training.clips.batches` does.
    """

    def own_picks(start: int) -> Iterator[Pick]:
        return picks(manifest, sampling, seed, rank, world_size, start)

    start = start_batch * batch_size
    block_picks = picks_per_block(manifest.size_px, 1 + sampling.num_frames)
    attempts = _attempts(manifest, own_picks(start), block_picks, num_cpus_per_task, prefetch)
    return batches(manifest, attempts, own_picks, batch_size, start)


def picks_per_block(size_px: int, num_frames: int) -> int:
    """How many picks of `num_frames` frames one task decodes."""
    return min(max(BLOCK_BYTES // (num_frames * size_px**2 * 3), 1), MAX_BLOCK_PICKS)


def _attempts(
    manifest: Manifest, own: Iterator[Pick], block_picks: int, num_cpus_per_task: float, prefetch: int
) -> Iterator[Attempt]:
    # A dataset has an end and a run has none, so that one follows the other.
    while True:
        dataset = _dataset(manifest, list(islice(own, block_picks * BLOCKS_PER_DATASET)), block_picks)
        options = dataset.context.execution_options
        options.preserve_order = True
        options.resource_limits = ExecutionResources.for_limits(object_store_memory=(2 * prefetch + 2) * BLOCK_BYTES)
        dataset.context.enable_progress_bars = False
        decoded = dataset.map_batches(
            partial(decode_block, folder=str(manifest.folder), size_px=manifest.size_px),
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=num_cpus_per_task,
            compute=TaskPoolStrategy(prefetch),
        )
        for block in decoded.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=prefetch):
            yield from attempts_of(block)


def _dataset(manifest: Manifest, own: list[Pick], block_picks: int) -> ray.data.Dataset:
    clips = [manifest.clips[pick.clip] for pick in own]
    rows = [
        {"clip": pick.clip, "name": clip.name, "num_frames": clip.num_frames, "frames": np.array(pick.frames)}
        for pick, clip in zip(own, clips, strict=True)
    ]
    return ray.data.from_items(rows, override_num_blocks=len(rows) // block_picks)


def decode_block(rows: Columns, folder: str, size_px: int) -> Columns:
    """A task's work: picks as columns `clip`, `name`, `num_frames`, `frames` to samples as columns.

    A pick that is bad has zeros, and in `code` and `message` what is wrong with it.
    """
    clips = tuple(Clip(str(name), int(num)) for name, num in zip(rows["name"], rows["num_frames"], strict=True))
    manifest = Manifest(Path(folder), size_px, 0.0, clips)
    frames = rows["frames"]
    # Decoded where they are sent from: copying 48 MiB once more is felt.
    pixels = np.empty((*frames.shape, size_px, size_px, 3), np.uint8)
    tried = [attempt(manifest, Pick(index, tuple(row.tolist())), pixels[index]) for index, row in enumerate(frames)]
    samples = [each if isinstance(each, Sample) else _blank(pixels[index]) for index, each in enumerate(tried)]
    errors = [("", "") if isinstance(each, Sample) else (each[1].code, str(each[1])) for each in tried]
    return {
        "clip": rows["clip"],
        "code": np.array([code for code, _ in errors]),
        "message": np.array([message for _, message in errors]),
        "pixels": pixels,
    } | {name: np.stack([getattr(sample, name) for sample in samples]) for name in PARTS if name != "pixels"}


def _blank(pixels: Pixels) -> Sample:
    """A sample of which nothing is known, whose pixels (f, s, s, 3) it blackens."""
    num_frames = len(pixels)
    pixels[:] = 0
    return Sample(
        pixels,
        np.zeros((num_frames, NUM_BOXES, 4), np.int32),
        np.zeros((num_frames, NUM_MOTIONS), np.float32),
        np.zeros((NUM_KEYPOINTS, 3), np.float32),
        -1,
    )


def attempts_of(block: Columns) -> Iterator[Attempt]:
    """The rows of a decoded block, as `training.clips.batches` takes them."""
    for index, (clip, code) in enumerate(zip(block["clip"].tolist(), block["code"].tolist(), strict=True)):
        if code:
            yield clip, BadClip(str(block["message"][index]), code)
        else:
            pixels, boxes, motions, canonical, person = (block[name][index] for name in PARTS)
            yield Sample(pixels, boxes, motions, canonical, clip, int(person))


@dataclass(frozen=True)
class Cost:
    """What loading takes in steady state."""

    frames_per_s: float
    cpu_ms_per_frame: float
    """User and system time of all processes that load: ranks, tasks, Ray Data's own actors, the raylet."""


@dataclass(frozen=True)
class Bench:
    """What is loaded, and how much of it is measured, after how much to warm up."""

    manifest: Manifest
    sampling: Sampling
    batch_size: int
    num_warm_frames: int
    num_frames: int


class Rank:
    """An actor that loads as a training worker does."""

    def __init__(self, bench: Bench, rank: int, world_size: int, num_cpus_per_task: float):
        self._batches = ray_batches(
            bench.manifest, bench.sampling, bench.batch_size, 0, rank, world_size, num_cpus_per_task=num_cpus_per_task
        )

    def advance(self) -> int:
        """Takes a batch; returns its number of frames."""
        return _num_frames(next(self._batches))


def _num_frames(batch: Batch) -> int:
    return batch.pixels.shape[0] * batch.pixels.shape[1]


def measure_plain(bench: Bench) -> Cost:
    """The plain loop in this process."""
    loaded = plain_batches(bench.manifest, bench.sampling, bench.batch_size, 0, 0, 1)
    return _measure(bench, lambda: _num_frames(next(loaded)), lambda: {0: time.process_time()}, "plain loop")


def measure_ranks(bench: Bench, num_ranks: int, num_cpus_per_task: float) -> Cost:
    """Ranks that take their batches in step, as in training. Ray must have been started by this process."""
    make: Any = ray.remote(num_cpus=0)(Rank)
    ranks = [make.remote(bench, rank, num_ranks, num_cpus_per_task) for rank in range(num_ranks)]
    try:
        return _measure(
            bench,
            lambda: sum(ray.get([rank.advance.remote() for rank in ranks])),
            _cpu_s,
            f"{num_ranks} ranks" if num_ranks > 1 else "one rank",
        )
    finally:
        for rank in ranks:
            ray.kill(rank)


def _measure(bench: Bench, advance: Callable[[], int], cpu_s: Callable[[], dict[int, float]], name: str) -> Cost:
    with tqdm(desc=name, unit="frame", total=bench.num_warm_frames + bench.num_frames) as bar:
        _take(bench.num_warm_frames, advance, bar)
        before, started_s = cpu_s(), time.monotonic()
        num_frames = _take(bench.num_frames, advance, bar)
        after, spent_s = cpu_s(), time.monotonic() - started_s
    cpu = sum(value - before.get(pid, 0.0) for pid, value in after.items())
    return Cost(num_frames / spent_s, 1e3 * cpu / num_frames)


def _take(num_frames: int, advance: Callable[[], int], bar: Any) -> int:
    """Loads at least so many frames; returns how many."""
    taken = 0
    while taken < num_frames:
        taken += (more := advance())
        bar.update(more)
    return taken


def _cpu_s() -> dict[int, float]:
    """User and system seconds by process id: this process, ranks, tasks, Ray Data's own actors, and the raylet."""
    spent: dict[int, float] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if _is_involved(" ".join(process.cmdline())):
                times = process.cpu_times()
                spent[process.pid] = times.user + times.system
    return spent | {os.getpid(): time.process_time()}


def _is_involved(command: str) -> bool:
    # Ray's other daemons (head, dashboard agent, log monitor) take their time whether anything is loaded or not.
    is_worker = command.startswith("ray::") and not command.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
    return is_worker or "/raylet/raylet " in command


def table_of(costs: dict[str, list[Cost]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and of each round's ratio to the plain loop and to one rank."""
    table = {}
    for name, rounds in costs.items():
        cpu = [cost.cpu_ms_per_frame for cost in rounds]
        table[name] = {
            "frames_per_s": median(cost.frames_per_s for cost in rounds),
            "cpu_ms_per_frame": median(cpu),
        } | {
            f"over_{other}": median(a / b.cpu_ms_per_frame for a, b in zip(cpu, costs[other], strict=True))
            for other in ("plain", "one_rank")
        }
    return table


def _print_table(table: dict[str, dict[str, float]]) -> None:
    print(f"{'':10} {'frames/s':>9} {'CPU ms/frame':>13} {'over plain':>11} {'over one rank':>14}")
    for name, row in table.items():
        values = [row[key] for key in ("frames_per_s", "cpu_ms_per_frame", "over_plain", "over_one_rank")]
        print(f"{name.replace('_', ' '):10} {values[0]:9.0f} {values[1]:13.3f} {values[2]:11.2f} {values[3]:14.2f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.loading", description="Measures loading.")
    parser.add_argument("data", type=Path, help="a data folder")
    parser.add_argument("--kind", choices=("run", "spread"), default="run", help="how frames make a sample")
    parser.add_argument("--frames", type=int, default=16, help="target frames per sample")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="samples per batch and rank")
    parser.add_argument("--measured", type=int, default=16_000, help="frames that are measured of each")
    parser.add_argument("--warm", type=int, default=4_000, help="frames before that")
    parser.add_argument("--rounds", type=int, default=3, help="how often all three are measured, in turn")
    parser.add_argument("--cpus-per-task", type=float, default=0.5)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    args = parser.parse_args()
    try:
        manifest = read_manifest(args.data)
        sampling = Sampling(args.frames, args.kind, args.stride)
        bench = Bench(manifest, sampling, args.batch, args.warm, args.measured)
        table = run_bench(bench, args.rounds, args.cpus_per_task)
    except UserError as error:
        parser.error(str(error))
    _print_table(table)
    if args.json:
        about = {"kind": args.kind, "num_frames": args.frames, "batch_size": args.batch, "size_px": manifest.size_px}
        print(json.dumps(about | table))


def run_bench(bench: Bench, num_rounds: int, num_cpus_per_task: float) -> dict[str, dict[str, float]]:
    """Plain loop, one rank and two ranks in turn, on a Ray of its own on this machine."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    costs: dict[str, list[Cost]] = {"plain": [], "one_rank": [], "two_ranks": []}
    try:
        for _ in range(num_rounds):
            costs["plain"].append(measure_plain(bench))
            costs["one_rank"].append(measure_ranks(bench, 1, num_cpus_per_task))
            costs["two_ranks"].append(measure_ranks(bench, 2, num_cpus_per_task))
    finally:
        ray.shutdown()
    return table_of(costs)


if __name__ == "__main__":
    main()
