"""How well the stages overlap: `python -m cluster.overlap [--json] [--artificial-ms 100] [--chunks 40]`.

Motion, denoise and decode sleep instead of working, and messages have their real sizes. Measured are chunks a second
through the actors with four chunks in flight, and of the same stages one after another in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from dataclasses import asdict, dataclass

import numpy as np
import ray

from cluster.artificial import CONFIG, artificial_stages
from cluster.session import Pool, Session
from cluster.settings import PoolSettings
from stages.messages import Pixels

MAX_IN_FLIGHT = 4
"""One more than there are stages: none of them waits for the way between two others."""
TIMED = ("motion", "denoise", "decode")
NUM_HOPS = 4
"""Into motion, to denoise, to decode, and back."""


@dataclass(frozen=True)
class Overlap:
    """What was measured."""

    artificial_ms: float
    chunks: int
    actors_per_s: float
    """Chunks a second through the actors, the filling of the pipeline included."""
    one_after_another_per_s: float
    ratio: float
    latency_ms: float
    """Median of one chunk alone, there and back."""
    hop_ms: float
    """What is left of it for each hop when the stages' own time is taken off."""


async def measure(artificial_ms: float, num_chunks: int) -> Overlap:
    """Runs both ways in the cluster that Ray is connected to."""
    settings = PoolSettings(artificial_ms=tuple((stage, artificial_ms) for stage in TIMED), lease_s=10.0)
    frames = np.zeros((CONFIG.window.chunk_frames, CONFIG.size_px, CONFIG.size_px, 3), np.uint8)
    pool = await Pool.connect(settings)
    session = await pool.open(frames[0], seed=0)
    alone_ms = [await _timed_ms(session, frames) for _ in range(11)]
    latency_ms = float(np.median(alone_ms))
    started_s = time.perf_counter()
    await _run(session, frames, num_chunks)
    actors_per_s = num_chunks / (time.perf_counter() - started_s)
    await session.close()
    await pool.close()
    alone_per_s = one_after_another(settings, frames, max(num_chunks // 4, 1))
    hop_ms = (latency_ms - len(TIMED) * artificial_ms) / NUM_HOPS
    return Overlap(artificial_ms, num_chunks, actors_per_s, alone_per_s, actors_per_s / alone_per_s, latency_ms, hop_ms)


async def _run(session: Session, frames: Pixels, num_chunks: int) -> None:
    """All chunks, at most MAX_IN_FLIGHT of them at once."""
    slots = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def one() -> None:
        async with slots:
            await session.run(frames)

    await asyncio.gather(*(one() for _ in range(num_chunks)))


async def _timed_ms(session: Session, frames: Pixels) -> float:
    started_s = time.perf_counter()
    await session.run(frames)
    return (time.perf_counter() - started_s) * 1e3


def one_after_another(settings: PoolSettings, frames: Pixels, num_chunks: int) -> float:
    """Chunks a second of the same stages called in turn in this process."""
    stages = artificial_stages(settings.artificial_ms)
    motion = stages.motion.open(frames[0])
    window = stages.denoise.open(stages.reference.open(frames[0]), motion.portrait_tokens, 0)
    started_s = time.perf_counter()
    for _ in range(num_chunks):
        [(motion, moved)] = stages.motion.run([motion], [frames])
        [(window, clean, _)] = stages.denoise.run([window], [moved])
        stages.decode.run([clean])
    return num_chunks / (time.perf_counter() - started_s)


def table(result: Overlap) -> str:
    """The figures for people."""
    rows = [
        (f"through the actors, {MAX_IN_FLIGHT} chunks in flight", f"{result.actors_per_s:.2f} chunks/s"),
        ("the same stages one after another", f"{result.one_after_another_per_s:.2f} chunks/s"),
        ("ratio", f"{result.ratio:.2f}"),
        ("one chunk alone, median", f"{result.latency_ms:.1f} ms"),
        ("of which per hop", f"{result.hop_ms:.1f} ms"),
    ]
    return "\n".join(f"{name:<42}{value:>18}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.overlap", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artificial-ms", type=float, default=100.0, help="time of motion, denoise and decode each")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--address", default="local", help="of a Ray cluster; by default one is started for this run")
    args = parser.parse_args()
    ray.init(address=args.address, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    try:
        result = asyncio.run(measure(args.artificial_ms, args.chunks))
    finally:
        ray.shutdown()
    print(json.dumps(asdict(result), indent=2) if args.json else table(result))


if __name__ == "__main__":
    main()
