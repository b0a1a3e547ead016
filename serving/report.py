"""What the client measures, as figures: rates, delays and their percentiles, in all and per 10 seconds. Pure.

Called by `serving.client`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BIN_S = 10.0


@dataclass(frozen=True)
class Receipt:
    """One output frame that belongs to a driving frame."""

    received_s: float
    """Since the first driving frame was sent."""
    delay_ms: float
    """From capture to receipt, on the client's own clock."""


def percentiles(delays_ms: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99; None where nothing was measured."""
    if not delays_ms:
        return {"p50": None, "p95": None, "p99": None}
    values = np.percentile(delays_ms, [50, 95, 99])
    return {name: round(float(value), 1) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def rate(receipts: Sequence[Receipt]) -> float:
    """Frames per second between the first receipt and the last."""
    span_s = receipts[-1].received_s - receipts[0].received_s if len(receipts) > 1 else 0.0
    return round((len(receipts) - 1) / span_s, 2) if span_s > 0 else 0.0


def per_10_s(receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
    """One entry per 10 seconds in which frames came: `t_s` where it starts, `fps`, `delay_ms`.

    The first and last entry's rate counts the time that they have, not the ten seconds that they lack.
    """
    bins: dict[int, list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        bins[int(receipt.received_s // BIN_S)].append(receipt)
    last_s = receipts[-1].received_s if receipts else 0.0
    return [
        {
            "t_s": number * BIN_S,
            "fps": round(len(inside) / BIN_S, 2) if (number + 1) * BIN_S <= last_s else rate(inside),
            "delay_ms": percentiles([receipt.delay_ms for receipt in inside]),
        }
        for number, inside in sorted(bins.items())
    ]


def mean_stage_ms(chunks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every stage's time."""
    times: dict[str, list[float]] = defaultdict(list)
    for chunk in chunks:
        for stage, ms in chunk.items():
            times[stage].append(ms)
    return {stage: round(sum(values) / len(values), 2) for stage, values in sorted(times.items())}


def as_text(report: Mapping[str, Any]) -> str:
    """The report for people."""

    def delays(values: Mapping[str, float | None]) -> str:
        return ", ".join(f"{name} {'-' if ms is None else f'{ms:.0f}'}" for name, ms in values.items())

    sent, dropped, received = (report[f"frames_{what}"] for what in ("sent", "dropped", "received"))
    lines = [
        f"frames: {sent} sent, {dropped} dropped, {received} received",
        f"rate:   {report['fps']} frames a second",
        f"delay:  {delays(report['delay_ms'])} ms from capture to receipt",
    ]
    for part in report["per_10_s"]:
        lines.append(f"  from {part['t_s']:4.0f} s: {part['fps']:5.1f} fps, {delays(part['delay_ms'])} ms")
    stages = ", ".join(f"{stage} {ms:.0f}" for stage, ms in report["stage_ms"].items())
    return "\n".join([*lines, f"stages: {stages or '-'} ms a chunk", f"sha256: {report['frames_sha256']}"])
