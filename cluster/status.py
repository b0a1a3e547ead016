"""What the manager knows of members and sessions, and how `/v1/status` says it. Used by `cluster.pool`."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.messages import Life, MemberReport
from cluster.metrics import rss_mb
from cluster.placement import MemberPlan

FIRST_CALL_S = 300.0
"""How long a stage's first call may take; later ones `SLOW_CALLS` times as long as the longest that was measured."""
SLOW_CALLS = 10.0
REPLICA_KEYS = ("id", "pid", "rss_mb", "num_sessions")
ADMISSIONS = ("admitted", "queued", "refused", "resumed", "recovered")
NUM_ID_DIGITS = 8
"""Of a session, for people."""


@dataclass
class Watched:
    """A member and what the manager last heard of it."""

    plan: MemberPlan
    handle: Any
    up: asyncio.Event = field(default_factory=asyncio.Event)
    life: Life | None = None
    report: MemberReport | None = None
    heard_s: float = float("-inf")
    """When it last reported."""
    busy: float = 0.0
    """Share of the time between the last two reports that its busiest stage was at work."""
    lost_s: float = float("-inf")
    """When it was last found dead."""
    has_hung: bool = False
    """Whether its next restart will be for that reason."""
    num_restarts: int = 0


@dataclass(frozen=True)
class Seat:
    """Where a session lives: member names by stage."""

    lease: str
    members: Mapping[str, str]
    epoch: int
    came_s: float
    """When it was seated first, on the wall clock."""
    is_idle: bool = False
    """It keeps its members' state, but not its place."""


def is_stuck(report: MemberReport, hang_s: float) -> bool:
    """Whether a stage's call takes so much longer than any before that it will not end."""
    longest_s = max((ms for times in report.call_ms.values() for ms in times.values()), default=0.0) / 1e3
    return report.stuck_s > max(hang_s, SLOW_CALLS * longest_s if longest_s else FIRST_CALL_S)


def member_status(member: Watched, seats: Iterable[Seat]) -> dict[str, Any]:
    """One member, for people."""
    report, life = member.report, member.life
    return {
        "name": member.plan.name,
        "stages": list(member.plan.stages),
        "pid": life and life.pid,
        "node": life and life.node,
        "up": member.up.is_set(),
        "is_spare": member.plan.is_spare,
        "num_sessions": sum(member.plan.name in seat.members.values() for seat in seats),
        "rss_mb": report and round(report.rss_mb, 1),
        "busy": member.busy,
        "call_ms": {
            stage: {str(num): round(ms, 1) for num, ms in sorted(times.items())}
            for stage, times in (report.call_ms if report else {}).items()
        },
        "num_restarts": member.num_restarts,
    }


def manager_status(up_s: float) -> dict[str, Any]:
    """The manager's own process."""
    return {"pid": os.getpid(), "rss_mb": rss_mb(), "up_s": round(up_s, 1)}


def replica_status(replica: Mapping[str, Any]) -> dict[str, Any]:
    """One ingress replica, of what it has told."""
    return {key: replica.get(key) for key in REPLICA_KEYS}


def session_statuses(replicas: Iterable[Mapping[str, Any]], seats: Mapping[str, Seat]) -> list[dict[str, Any]]:
    """The sessions that replicas have told of and that have a seat."""
    told = [session for replica in replicas for session in replica.get("sessions", ()) if session["id"] in seats]
    return [
        session | {"id": session["id"][:NUM_ID_DIGITS], "members": dict(seats[session["id"]].members)}
        for session in told
    ]


def all_counts(admissions: Mapping[str, int], replicas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the manager has counted, and the frames that the present replicas have."""
    frames: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for counts in (replica.get("counts", {}) for replica in replicas):
        frames.update({key: counts.get(key, 0) for key in ("frames_in", "frames_out")})
        dropped.update(counts.get("dropped", {}))
    return {key: admissions.get(key, 0) for key in ADMISSIONS} | dict(frames) | {"dropped": dict(dropped)}
