"""What a run says while it trains: metrics.jsonl, TensorBoard's event files, and a progress bar.

`training.run` shows the bar; `training.task` writes the files on rank 0.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

METRICS = "metrics.jsonl"
EVENTS = "curves"
POLL_S = 0.5
MAX_LINE_BYTES = 8192

Metrics = dict[str, float]
log = logging.getLogger(__name__)


class Curves:
    """Appends metrics to `place`/metrics.jsonl and to the event files in `place`/curves.

    A resumed run repeats some steps: what earlier attempts said of them is dropped at the first report.
    """

    def __init__(self, place: Path):
        self._place = place
        self._writer: SummaryWriter | None = None

    def write(self, metrics: Metrics) -> None:
        """Adds what a report says; its `step` is the place on the curves. On a full disk it is left out: curves are no
        reason to stop."""
        try:
            self._add(metrics, int(metrics["step"]))
        except OSError as error:
            log.warning("curves in %s are not written (%s): make room there; training goes on", self._place, error)

    def _add(self, metrics: Metrics, step: int) -> None:
        if self._writer is None:
            _drop_from(self._place / METRICS, step)
            self._writer = SummaryWriter(str(self._place / EVENTS), purge_step=step)
        with open(self._place / METRICS, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()


def read_metrics(place: Path) -> list[Metrics]:
    """All reports in `place`, in the order of their steps; a line that was cut off is left out."""
    path = place / METRICS
    return [metrics for line in _lines(path) if (metrics := _parsed(line))] if path.exists() else []


def show(bar: tqdm, metrics: Metrics) -> None:
    """Moves a bar of steps to a report."""
    bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['samples_per_s']:.1f} samples/s", refresh=False)
    bar.update(int(metrics["step"]) - bar.n)


@contextmanager
def followed(place: Path, bar: tqdm) -> Iterator[None]:
    """Keeps a bar at what workers elsewhere write into `place`, in a thread, for as long as the context lasts."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_S):
            if metrics := _last(place / METRICS):
                show(bar, metrics)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if metrics := _last(place / METRICS):
            show(bar, metrics)


def _last(path: Path) -> Metrics | None:
    """The last whole report of a file that may be growing."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_LINE_BYTES))
        for line in reversed(file.read().decode(errors="replace").splitlines()):
            if metrics := _parsed(line):
                return metrics
    return None


def _parsed(line: str) -> Metrics | None:
    try:
        metrics: Metrics = json.loads(line)
        return metrics if {"step", "loss", "samples_per_s"} <= metrics.keys() else None
    except (ValueError, AttributeError):
        return None


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _drop_from(path: Path, step: int) -> None:
    """Keeps the whole reports before a step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [metrics for metrics in read_metrics(path.parent) if metrics["step"] < step]
    partial = path.with_suffix(".part")
    partial.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept))
    partial.replace(path)
