"""The figures of the load generator's runs, with the keys that `--json` prints. Pure.

Called by `serving.bench.runs`. What came after a run's end is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from serving import report
from serving.bench.log import Kill, Log, Memory, Newcomer, Output, SessionLog
from serving.line import Event, ServerError
from serving.report import Receipt

PARTS = ("restart", "imports", "weights", "restore", "first_frame")
"""What an interruption is made of, as the server tells it."""
INTERRUPTIONS = ("recovering", "lost")
FIRST_MINUTE_S = 60.0
NUM_SMOOTHED = 6
"""Samples of memory whose median is taken at either end of its growth."""


def figures(log: Log, alone: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One entry of `runs`. `alone`: that of the same sessions without bad clients."""
    plan, span_s = log.plan, (log.ended_ms - log.started_ms) / 1000
    outputs = [[one for one in session.outputs if one.received_ms <= log.ended_ms] for session in log.sessions]
    by_session = [receipts(each, log.started_ms) for each in outputs]
    together = sorted((receipt for each in by_session for receipt in each), key=lambda receipt: receipt.received_s)
    fps = [rate_until(each, log.ended_ms) for each in outputs]
    delay_ms = report.percentiles([receipt.delay_ms for receipt in together])
    recovered = list(recoveries(log.kills, log.sessions))
    return {
        "name": plan.name,
        "sessions": plan.num_sessions,
        "seconds": round(span_s, 1),
        "overload": plan.overload,
        "kill": plan.kill,
        "bad_clients": None if log.bad_clients is None else dict(log.bad_clients),
        "input_fps": round(plan.input_fps, 2),
        "total_fps": round(sum(fps), 2),
        "fps": fps,
        "delay_ms": delay_ms,
        "delay_ms_per_session": [report.percentiles([one.delay_ms for one in each]) for each in by_session],
        "p95_ratio": None if alone is None else p95_ratio(delay_ms, alone["delay_ms"]),
        "newcomer": None if log.newcomer is None else newcomer_figures(log.newcomer, by_session, log),
        "jitter_ms": jitter_ms(outputs),
        "chunk_period_ms": chunk_period_ms(fps, log.chunk_frames),
        "dropped": dict(sorted(sum((session.dropped for session in log.sessions), Counter[str]()).items())),
        "num_kills": len(log.kills),
        "kills": list(kill_gaps(log.kills, log.sessions, log.ended_ms)),
        "recoveries": recovered,
        "kill_to_next_frame_ms": middle_and_worst([each["total_ms"] for each in recovered]),
        "num_not_recovered": log.num_not_recovered,
        "sockets_closed_by_server": num_closed_by_server(log.kills, log.sessions),
        "frames_to_wrong_session": sum(session.num_wrong for session in log.sessions),
        "frames_checked": sum(session.num_checked for session in log.sessions),
        "server_rss_mb": start_and_end([sample.server_mb for sample in log.memory]),
        "ray_rss_mb": start_and_end([sample.ray_mb for sample in log.memory]),
        "rss_mb": [[sample.t_s, sample.server_mb] for sample in log.memory],
        "memory_growth_after_first_minute": growth_after_first_minute(log.memory),
        "per_10_s": report.per_10_s(together),
        "events": dict(sorted(Counter(event.name for session in log.sessions for event in session.events).items())),
        "client_cpu": round(log.client_cpu_s / span_s, 3) if span_s > 0 else None,
        "errors": errors(log),
    }


def errors(log: Log) -> list[dict[str, Any]]:
    """What went wrong: of the whole run (`session` null), and sessions that ended before the run did."""
    found = [(None, log.error), *((number, session.error) for number, session in enumerate(log.sessions))]
    return [
        {"session": number, "code": error.code, "message": str(error)} for number, error in found if error is not None
    ]


def receipts(outputs: Sequence[Output], started_ms: float) -> list[Receipt]:
    """The output frames that belong to driving frames."""
    return [
        Receipt((output.received_ms - started_ms) / 1000, output.delay_ms)
        for output in outputs
        if output.delay_ms is not None
    ]


def newcomer_figures(newcomer: Newcomer, by_session: Sequence[Sequence[Receipt]], log: Log) -> dict[str, Any]:
    """What it was told, what its waiting did to each of the others, and how soon after they had left it had a place."""
    came_s = (newcomer.came_ms - log.started_ms) / 1000
    p95_ms = []
    for receipts_of_one in by_session:
        before = report.percentiles([one.delay_ms for one in receipts_of_one if one.received_s < came_s])
        after = report.percentiles([one.delay_ms for one in receipts_of_one if one.received_s >= came_s])
        p95_ms.append({"before": before["p95"], "after": after["p95"], "ratio": p95_ratio(after, before)})
    position, estimate_s = newcomer.waiting or (None, None)
    ready_ms = None if newcomer.ready_ms is None else round(newcomer.ready_ms - log.ended_ms, 1)
    return {"position": position, "estimate_s": estimate_s, "ready_after_leave_ms": ready_ms, "p95_ms": p95_ms}


def rate_until(outputs: Sequence[Output], end_ms: float) -> float:
    """Frames per second from the first one to the end, also those of a transition, which are as much work.

    A session that falls silent so gets slow, not short.
    """
    span_s = (end_ms - outputs[0].received_ms) / 1000 if outputs else 0.0
    return round((len(outputs) - 1) / span_s, 2) if span_s > 0 else 0.0


def jitter_ms(sessions: Sequence[Sequence[Output]]) -> float | None:
    """95 % of the gaps between two frames of a session differ from its median gap by less than this."""
    deviations: list[float] = []
    for outputs in sessions:
        gaps_ms = np.diff([output.received_ms for output in outputs])
        deviations += np.abs(gaps_ms - np.median(gaps_ms)).tolist() if len(gaps_ms) else []
    return round(float(np.percentile(deviations, 95)), 1) if deviations else None


def chunk_period_ms(fps: Sequence[float], chunk_frames: int) -> float | None:
    """From one chunk of a session to the next, by the sessions' mean rate."""
    mean_fps = sum(fps) / len(fps) if fps else 0.0
    return round(chunk_frames / mean_fps * 1000, 1) if mean_fps else None


def recoveries(kills: Sequence[Kill], sessions: Sequence[SessionLog]) -> Iterator[dict[str, Any]]:
    """One entry per kill and session that it interrupted."""
    for kill, end_ms in _until_the_next(kills):
        for number, session in enumerate(sessions):
            events = [event for event in session.events if kill.at_ms <= event.at_ms < end_ms]
            noticed = next((event for event in events if event.name in INTERRUPTIONS), None)
            if noticed is None:
                continue
            again = next((event for event in events if event.name == "recovered"), None)
            yield {
                "kill": kill.what,
                "pid": kill.pid,
                "session": number,
                "detect_ms": round(noticed.at_ms - kill.at_ms, 1),
                **{f"{part}_ms": _part_ms(again, part) for part in PARTS},
                "total_ms": _next_frame_ms(session.outputs, kill.at_ms, (again or noticed).at_ms, end_ms),
            }


def kill_gaps(kills: Sequence[Kill], sessions: Sequence[SessionLog], ended_ms: float) -> Iterator[dict[str, Any]]:
    """One entry per kill: the longest time until the next kill in which any session got no frame.

    It counts from the last frame before the kill, and those sessions too that were told of nothing.
    """
    for kill, end_ms in _until_the_next(kills):
        gaps = [_longest_gap_ms(session.outputs, kill.at_ms, min(end_ms, ended_ms)) for session in sessions]
        longest_ms = max((gap for gap in gaps if gap is not None), default=None)
        yield {"kill": kill.what, "pid": kill.pid, "longest_gap_ms": longest_ms}


def _longest_gap_ms(outputs: Sequence[Output], since_ms: float, end_ms: float) -> float | None:
    times_ms = [output.received_ms for output in outputs if output.received_ms < end_ms]
    gaps = [later - earlier for earlier, later in pairwise([*times_ms, end_ms]) if later >= since_ms]
    return round(max(gaps), 1) if gaps else None


def _until_the_next(kills: Sequence[Kill]) -> Iterator[tuple[Kill, float]]:
    for number, kill in enumerate(kills):
        yield kill, kills[number + 1].at_ms if number + 1 < len(kills) else float("inf")


def _part_ms(recovered: Event | None, part: str) -> float | None:
    ms = None if recovered is None else recovered.detail.get(part)
    return None if ms is None else round(ms, 1)


def _next_frame_ms(outputs: Sequence[Output], since_ms: float, after_ms: float, end_ms: float) -> float | None:
    # Frames that were already on their way still come between the notice and the word that the picture goes on.
    times = (output.received_ms for output in outputs if after_ms <= output.received_ms < end_ms)
    first_ms = next(times, None)
    return None if first_ms is None else round(first_ms - since_ms, 1)


def middle_and_worst(totals_ms: Sequence[float | None]) -> dict[str, float | None]:
    """Median, p95 and maximum of the recoveries that came to their ends."""
    known = [ms for ms in totals_ms if ms is not None]
    if not known:
        return {"median": None, "p95": None, "max": None}
    values = np.percentile(known, [50, 95, 100])
    return {name: round(float(value), 1) for name, value in zip(("median", "p95", "max"), values, strict=True)}


def num_closed_by_server(kills: Sequence[Kill], sessions: Sequence[SessionLog]) -> int:
    """Sockets that a living replica closed: all that closed, but for those that a killed one held."""
    num_lost = sum(event.name == "lost" for session in sessions for event in session.events)
    num_died = sum(
        any(event.name == "lost" and kill.at_ms <= event.at_ms < end_ms for event in sessions[number].events)
        for kill, end_ms in _until_the_next(kills)
        for number in kill.sessions
    )
    return num_lost - num_died + sum(_was_ended(session) for session in sessions)


def _was_ended(session: SessionLog) -> bool:
    # By a fatal error on a socket that stood, not one that refused to take a lost session back.
    names = [event.name for event in session.events if event.name in ("lost", "reconnected")]
    return isinstance(session.error, ServerError) and names[-1:] != ["lost"]


def start_and_end(values: Sequence[float | None]) -> dict[str, float | None]:
    """The first and the last one."""
    return {"start": values[0] if values else None, "end": values[-1] if values else None}


def growth_after_first_minute(samples: Sequence[Memory]) -> float | None:
    """The server's memory at the end over that after the first minute, less one; None for shorter runs."""
    later = [sample.server_mb for sample in samples if sample.t_s >= FIRST_MINUTE_S]
    if len(later) < 2 or not later[0]:
        return None
    num_smoothed = min(NUM_SMOOTHED, len(later) // 2)
    return round(float(np.median(later[-num_smoothed:]) / np.median(later[:num_smoothed])) - 1, 4)


def p95_ratio(beside: Mapping[str, float | None], alone: Mapping[str, float | None]) -> float | None:
    """How much longer the p95 of the delay is than that of the same sessions undisturbed."""
    after, before = beside["p95"], alone["p95"]
    return round(after / before, 3) if before and after else None
