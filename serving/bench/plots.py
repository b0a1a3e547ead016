"""Plots of the load generator's figures. Called by `serving.bench --plots DIR`; matplotlib is imported only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.bench.report import PARTS
from stages.errors import UserError

PART_KEYS = ("detect_ms", *(f"{part}_ms" for part in PARTS))

Run = Mapping[str, Any]


class NoMatplotlib(UserError):
    """Plots need what only an extra installs."""

    code = "no_matplotlib"


def load_matplotlib() -> Any:
    """matplotlib.pyplot, drawing into files only. Raises NoMatplotlib."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise NoMatplotlib(f"--plots needs matplotlib ({error}): pip install 'personalive-ray[bench]'") from None
    return pyplot


def write_plots(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws what the runs have data for, as PNG files; returns them. Raises NoMatplotlib."""
    pyplot = load_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    runs = figures["runs"]
    disturbances = ("overload", "kill", "bad_clients", "newcomer")
    plain = [run for run in runs if all(run[what] is None for what in disturbances)]
    drawings = {
        "delay": (draw_delay, [run for run in runs if run["per_10_s"]]),
        "memory": (draw_memory, [run for run in runs if len(run["rss_mb"]) > 1]),
        "fps": (draw_fps, plain),
        "kills": (draw_kills, [run for run in runs if run["recoveries"]]),
    }
    written = []
    for what, (draw, drawn) in drawings.items():
        if drawn:
            figure, axes = pyplot.subplots(1, 2 if draw is draw_kills else 1, figsize=(11, 4.5), layout="constrained")
            draw(axes, drawn)
            written.append(folder / f"{what}.png")
            figure.savefig(written[-1], dpi=100)
            pyplot.close(figure)
    return written


def draw_delay(axes: Any, runs: Sequence[Run]) -> None:
    """p50 as a line and p95 as a dotted one of the same colour, for every ten seconds."""
    for run in runs:
        times_s = [part["t_s"] for part in run["per_10_s"]]
        (line,) = axes.plot(times_s, [part["delay_ms"]["p50"] for part in run["per_10_s"]], label=run["name"])
        p95_ms = [part["delay_ms"]["p95"] for part in run["per_10_s"]]
        axes.plot(times_s, p95_ms, linestyle=":", color=line.get_color())
    axes.set(xlabel="s", ylabel="ms", title="capture to receipt: p50, dotted p95, per 10 s", ylim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def draw_memory(axes: Any, runs: Sequence[Run]) -> None:
    """The server's memory."""
    for run in runs:
        axes.plot(*zip(*run["rss_mb"], strict=True), label=run["name"])
    axes.set(xlabel="s", ylabel="MB", title="memory of replicas, members and manager", ylim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def draw_fps(axes: Any, runs: Sequence[Run]) -> None:
    """Each run as a bar of its sessions' rates on top of one another."""
    labels = [str(run["sessions"]) for run in runs]
    for place, run in enumerate(runs):
        bottom = 0.0
        for fps in run["fps"]:
            axes.bar(place, fps, bottom=bottom, color=f"C{place}", edgecolor="white")
            bottom += fps
        axes.text(place, bottom, f"{run['total_fps']:.1f}", ha="center", va="bottom")
    axes.set_xticks(range(len(runs)), labels)
    axes.set(xlabel="sessions", ylabel="frames a second", title="output of all sessions, each a part of its bar")


def draw_kills(axes: Any, runs: Sequence[Run]) -> None:
    """How long interruptions took, by what was killed, and what their mean is made of."""
    recoveries = [each for run in runs for each in run["recoveries"] if each["total_ms"] is not None]
    kinds = list(dict.fromkeys(each["kill"] for each in recoveries))
    by_kind = {kind: [each for each in recoveries if each["kill"] == kind] for kind in kinds}
    seconds = [[each["total_ms"] / 1000 for each in by_kind[kind]] for kind in kinds]
    axes[0].hist(seconds, bins=20, stacked=True, label=kinds)
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    axes[0].set(xlabel="s", ylabel="interruptions", title="from a kill to the next frame")
    bottoms = [0.0] * len(kinds)
    for part, heights in mean_parts_s(by_kind).items():
        axes[1].bar(kinds, heights, bottom=bottoms, label=part.replace("_", " "))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes[1].set(ylabel="s", title="what the mean is made of")
    for side in axes:
        side.legend(loc="upper left", bbox_to_anchor=(1, 1))


def mean_parts_s(by_kind: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """Each part's mean in seconds for every kind; `rest` is what no part accounts for."""

    def mean(entries: Sequence[Mapping[str, Any]], key: str) -> float:
        return sum(entry[key] or 0.0 for entry in entries) / len(entries) / 1000

    parts = {key.removesuffix("_ms"): [mean(entries, key) for entries in by_kind.values()] for key in PART_KEYS}
    totals = [mean(entries, "total_ms") for entries in by_kind.values()]
    accounted = [sum(heights) for heights in zip(*parts.values(), strict=True)]
    rest = [max(0.0, total - known) for total, known in zip(totals, accounted, strict=True)]
    return parts | {"rest": rest}
