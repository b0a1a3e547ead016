"""The figures of the load generator for people. Pure. Called by `serving.bench`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from serving.bench.report import PARTS

RUN_COLUMNS = ("run", "fps", "per session", "p50", "p95", "p99", "jitter", "memory MB", "dropped")
KILL_COLUMNS = (
    *("killed", "times", "interrupted", "detect", *(part.replace("_", " ") for part in PARTS)),
    *("to next frame", "longest", "longest gap"),
)

Run = Mapping[str, Any]


def as_text(figures: Mapping[str, Any]) -> str:
    """All runs: rates and delays, then what overload, kills and bad clients did. Times in ms."""
    runs = figures["runs"]
    blocks = [machine_line(figures["machine"]), columns([RUN_COLUMNS, *(run_row(run) for run in runs)])]
    blocks += [overload_lines(runs), *(kill_block(run) for run in runs if run["kill"])]
    blocks += [f"{run['name']}: p95 is {number(run['p95_ratio'], 2)} times that without" for run in bad(runs)]
    blocks += [newcomer_line(run) for run in runs if run["newcomer"] is not None]
    blocks += ["\n".join(f"error in {run['name']}: {error_text(error)}" for error in run["errors"]) for run in runs]
    return "\n\n".join(block for block in blocks if block)


def machine_line(machine: Mapping[str, Any]) -> str:
    """What it ran on."""
    versions = ", ".join(f"{what} {machine[what]}" for what in ("python", "torch", "ray"))
    return f"{machine['cores']} cores of {machine['cpu']}, GPU: {machine['gpu'] or 'none'}; {versions}"


def run_row(run: Run) -> Sequence[str]:
    """A run in the first table."""
    delays = [number(run["delay_ms"][which]) for which in ("p50", "p95", "p99")]
    memory = run["server_rss_mb"]
    return (
        run["name"],
        number(run["total_fps"], 1),
        " ".join(number(fps, 1) for fps in run["fps"]),
        *delays,
        number(run["jitter_ms"]),
        f"{number(memory['start'])} to {number(memory['end'])}",
        " ".join(f"{reason} {num}" for reason, num in run["dropped"].items()) or "-",
    )


def overload_lines(runs: Iterable[Run]) -> str:
    """How each overloaded run's p95 stands against the one with the least input, for the same number of sessions."""
    undisturbed = [run for run in runs if not run["kill"] and run["bad_clients"] is None and run["newcomer"] is None]
    lines = []
    for run in undisturbed:
        alike = [other for other in undisturbed if other["sessions"] == run["sessions"]]
        least = min(alike, key=lambda other: other["input_fps"])
        if run["overload"] is not None and run is not least:
            lines.append(f"{run['name']}: {against(run, least)}")
    return "\n".join(lines)


def against(run: Run, least: Run) -> str:
    """Overload is borne when p95 grows by no more than a chunk's period."""
    more_ms, period_ms = difference(run["delay_ms"]["p95"], least["delay_ms"]["p95"]), least["chunk_period_ms"]
    growth = run["memory_growth_after_first_minute"]
    memory = "" if growth is None else f"; memory {growth:+.1%} after the first minute"
    return (
        f"p95 {number(more_ms, sign='+')} ms against that with {number(least['input_fps'], 1)} frames a second, "
        f"a chunk takes {number(period_ms)} ms" + memory
    )


def difference(one: float | None, other: float | None) -> float | None:
    """None where one of them is not known."""
    return None if one is None or other is None else one - other


def kill_block(run: Run) -> str:
    """Medians by what was killed, and what must not have happened."""
    whats = list(dict.fromkeys(kill["kill"] for kill in run["kills"]))
    rows = [kill_row(run, what, {what}) for what in whats]
    rows += [kill_row(run, "all", set(whats))] if len(whats) > 1 else []
    summary = (
        f"{run['name']}: {run['num_kills']} kills, {len(run['recoveries'])} interruptions of sessions, "
        f"{run['num_not_recovered']} not over in time; {run['sockets_closed_by_server']} sockets closed by a living "
        f"replica; {run['frames_to_wrong_session']} of {run['frames_checked']} checked frames in the wrong session"
    )
    return summary + ("\n" + columns([KILL_COLUMNS, *rows]) if rows else "")


def kill_row(run: Run, title: str, whats: Container[str]) -> Sequence[str]:
    """The median of each part, the longest time to the next frame, and the longest without one of any session."""
    entries = [recovery for recovery in run["recoveries"] if recovery["kill"] in whats]
    kills = [kill for kill in run["kills"] if kill["kill"] in whats]

    def known(key: str, among: Sequence[Mapping[str, Any]] = entries) -> list[float]:
        return [entry[key] for entry in among if entry[key] is not None]

    keys = ("detect_ms", *(f"{part}_ms" for part in PARTS), "total_ms")
    medians = [number(median(known(key)) if known(key) else None) for key in keys]
    longest = [max(known("total_ms"), default=None), max(known("longest_gap_ms", kills), default=None)]
    return (title, str(len(kills)), str(len(entries)), *medians, *(number(ms) for ms in longest))


def newcomer_line(run: Run) -> str:
    """What one more person was told, and what that did to the others."""
    newcomer = run["newcomer"]
    ratios = " ".join(number(session["ratio"], 2) for session in newcomer["p95_ms"])
    return (
        f"{run['name']}: told to wait at position {number(newcomer['position'])}, "
        f"for {number(newcomer['estimate_s'])} s; "
        f"each session's p95 was {ratios} times that before; "
        f"ready {number(newcomer['ready_after_leave_ms'])} ms after the others had left"
    )


def bad(runs: Iterable[Run]) -> Iterable[Run]:
    """The runs beside bad clients."""
    return (run for run in runs if run["bad_clients"] is not None)


def error_text(error: Mapping[str, Any]) -> str:
    """What ended a session, or the run."""
    who = "" if error["session"] is None else f"session {error['session']}: "
    return f"{who}{error['code']}: {error['message']}"


def number(value: float | None, digits: int = 0, sign: str = "") -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length under one another, words to the left and figures to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    is_text = [place == 0 or header == "dropped" for place, header in enumerate(rows[0])]
    lines = (
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
