"""How metrics are declared and recorded, and those of members and manager. Used by them and by `serving.metrics`.

A set of metrics is a frozen dataclass of callables: each field is a metric, bears its name, and is annotated with what
it is. Made by its constructor a set records nothing, for tests and processes without Ray; made by `on_ray` it records
with `ray.util.metrics`, and every machine's Ray agent exports it to Prometheus as `ray_personalive_<field>`. Ray labels
it with the process; one more label may say stage, reason or the like, never a session. Only `on_ray` imports Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, get_type_hints

import psutil

PREFIX = "personalive_"
SHORT_MS = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000)
"""Bounds for the work of a stage. Ray's agent counts each value as the middle of its bucket, so sums are coarse."""
SIZES = (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 16.5, 32.5, 64.5)
"""Bounds for batches: as far as 8 the middle of a bucket is the whole number in it, so that means are exact."""

Plain = Callable[[float], None]
"""Adds to a counter, sets a gauge, or observes in a histogram."""
Labelled = Callable[[float, str], None]
"""The same, for one value of the metric's label."""
T = TypeVar("T")


@dataclass(frozen=True)
class Metric:
    """What a field of a set is annotated with."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    label: str | None = None
    bounds: tuple[float, ...] = ()
    """Of a histogram's buckets, rising."""


def nothing(value: float, label: str = "") -> None:
    """Records nowhere: what a metric does by default."""


def declarations(metrics: type) -> dict[str, Metric]:
    """The metrics of a set, by name."""
    hints = get_type_hints(metrics, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def on_ray(metrics: type[T]) -> T:
    """A set that records with Ray, for a process that is connected to it. One record costs 2 to 5 us."""
    return metrics(**{name: _recorded_by_ray(name, metric) for name, metric in declarations(metrics).items()})


@dataclass(frozen=True, kw_only=True)
class MemberMetrics:
    """What a member tells."""

    stage_calls_total: Annotated[Labelled, Metric("counter", "Calls of a stage, over any batch", "stage")] = nothing
    stage_ms: Annotated[Labelled, Metric("histogram", "Work of one call", "stage", SHORT_MS)] = nothing
    stage_wait_ms: Annotated[Labelled, Metric("histogram", "Wait of one chunk for its turn", "stage", SHORT_MS)] = (
        nothing
    )
    batch_size: Annotated[Labelled, Metric("histogram", "Sessions in one call", "stage", SIZES)] = nothing
    queue_length: Annotated[Labelled, Metric("gauge", "Chunks that wait", "stage")] = nothing
    member_rss_mb: Annotated[Labelled, Metric("gauge", "Resident memory of a member, in MiB", "stage")] = nothing
    """`stage`: all stages of the member, joined by +."""


@dataclass(frozen=True, kw_only=True)
class ManagerMetrics:
    """What the pool's manager tells."""

    places: Annotated[Plain, Metric("gauge", "Sessions that the pool can serve at the target rate")] = nothing
    member_restarts_total: Annotated[Labelled, Metric("counter", "Members started again", "kind")] = nothing
    """`kind`: why, `died` or `hung`."""


def record_call(metrics: MemberMetrics, stage: str, work_ms: float, waits_ms: Sequence[float]) -> None:
    """One call of a stage: how long it worked, and how long each of its sessions' chunks had waited for it."""
    metrics.stage_calls_total(1, stage)
    metrics.stage_ms(work_ms, stage)
    metrics.batch_size(len(waits_ms), stage)
    for wait_ms in waits_ms:
        metrics.stage_wait_ms(wait_ms, stage)


def rss_mb() -> float:
    """Resident memory of this process, in MiB."""
    return round(psutil.Process().memory_info().rss / 2**20, 1)


def _recorded_by_ray(name: str, metric: Metric) -> Callable[..., None]:
    from ray.util import metrics

    keys = () if metric.label is None else (metric.label,)
    named = (PREFIX + name, metric.description)
    write: Callable[..., None]
    if metric.kind == "histogram":
        write = metrics.Histogram(*named, list(map(float, metric.bounds)), keys).observe
    elif metric.kind == "gauge":
        write = metrics.Gauge(*named, keys).set
    else:
        write = metrics.Counter(*named, keys).inc

    def record(value: float, *labels: str) -> None:
        # Ray refuses to add nothing, and whole numbers that are numpy's.
        if value or metric.kind != "counter":
            write(float(value), dict(zip(keys, labels, strict=True)))

    return record
