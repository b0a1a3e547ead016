"""The metrics of an ingress replica: what its sessions count, and what of it `/v1/status` says. No Ray at import.

`serving.application` makes the set that records with Ray (`cluster.metrics.on_ray(IngressMetrics)`), sums its counters
up for the status (`Tally`), and hands it to the routes and their sessions. A session reports through a `SessionMeter`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from cluster.metrics import Labelled, Metric, Plain, declarations, nothing

DELAYS_MS = (50, 100, 200, 300, 400, 500, 650, 800, 1000, 1250, 1500, 2000, 2500, 3000, 4000, 5000, 7500, 10_000)
RECOVERIES_MS = (10, 50, 100, 250, 500, 1000, 2000, 3000, 5000, 7500, 10_000, 15_000, 20_000, 30_000, 60_000)

ENDS = frozenset({"end", "bye", "gone"})
"""How a session ends without an error: it has given everything out, the client stopped it, the client vanished."""
DROPS = frozenset({"surplus", "stale", "unused"})
"""Why a frame is dropped without an error."""
ERRORS = frozenset(
    {
        "not_hello",
        "bad_version",
        "bad_portrait",
        "no_face_in_portrait",
        "busy",
        "pool_full",
        "pool_failed",
        "too_large",
        "no_credit",
        "flooding",
        "idle",
        "stalled",
        "bad_header",
        "bad_frame",
        "frame_size_changed",
        "seq_backwards",
        "bad_receipt",
        "unexpected",
        "member_lost",
        "session_closed",
        "session_moved",
        "internal",
        "stage_failed",
        "stale_chunk",
        "too_many_chunks",
        "bad_chunk",
    }
)
"""The codes of docs/protocol.md."""
KNOWN = ENDS | DROPS | ERRORS


@dataclass(frozen=True, kw_only=True)
class IngressMetrics:
    """What an ingress replica tells."""

    frames_in_total: Annotated[Plain, Metric("counter", "Driving frames received")] = nothing
    frames_out_total: Annotated[Plain, Metric("counter", "Output frames sent, transitions included")] = nothing
    frames_dropped_total: Annotated[Labelled, Metric("counter", "Driving frames dropped", "reason")] = nothing
    delay_ms: Annotated[Plain, Metric("histogram", "From a frame's capture to shown", None, DELAYS_MS)] = nothing
    server_ms: Annotated[Plain, Metric("histogram", "From arrival to the output's sending", None, DELAYS_MS)] = nothing
    sessions: Annotated[Labelled, Metric("gauge", "Sessions of a replica", "state")] = nothing
    """`state`: `live`, `idle`, `queued` or `recovering`."""
    admissions_total: Annotated[Labelled, Metric("counter", "What hellos have led to", "outcome")] = nothing
    """`queued` those who had to wait; then and otherwise one of `admitted`, `resumed`, `refused`."""
    session_ends_total: Annotated[Labelled, Metric("counter", "Sessions ended, by error or ENDS", "code")] = nothing
    recoveries_total: Annotated[Plain, Metric("counter", "Sessions that went on after a process died")] = nothing
    recovery_ms: Annotated[Labelled, Metric("histogram", "Parts of a recovery", "part", RECOVERIES_MS)] = nothing
    """`part`: as in the protocol's `recovered`."""
    replica_rss_mb: Annotated[Plain, Metric("gauge", "Resident memory of a replica, in MiB")] = nothing


class SessionMeter:
    """Reports one session to the replica's metrics, in a few calls per chunk."""

    def __init__(self, metrics: IngressMetrics):
        self.metrics = metrics
        self._reported: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def count(self, num_received: int, num_sent: int, dropped: Mapping[str, int]) -> None:
        """How far the session's own counts are by now; what they have grown by since the last call is added.

        `dropped` is by reason. For every chunk, and once more when the session has ended.
        """
        self.metrics.frames_in_total(num_received - self._reported["in"])
        self.metrics.frames_out_total(num_sent - self._reported["out"])
        self._reported = Counter({"in": num_received, "out": num_sent})
        for reason, num in dropped.items():
            self.metrics.frames_dropped_total(num - self._dropped[reason], known_code(reason))
        self._dropped = Counter(dropped)

    def recovered(self, parts_ms: Mapping[str, float]) -> None:
        """The picture goes on after an interruption, which was made of these parts."""
        self.metrics.recoveries_total(1)
        for part, ms in parts_ms.items():
            self.metrics.recovery_ms(ms, part)

    def ended(self, code: str) -> None:
        """The session is over: an error's code, or one of `ENDS`."""
        self.metrics.session_ends_total(1, known_code(code))


class Tally:
    """The sums of a replica's counters, for its status: Ray's cannot be read back."""

    def __init__(self) -> None:
        self._sums: Counter[tuple[str, str]] = Counter()

    def along(self, metrics: IngressMetrics) -> IngressMetrics:
        """The same metrics, whose counters are summed up here too."""
        counters = [name for name, metric in declarations(IngressMetrics).items() if metric.kind == "counter"]
        return replace(metrics, **{name: self._tallied(name, getattr(metrics, name)) for name in counters})

    def counts(self) -> dict[str, Any]:
        """`counts` of `/v1/status`, for this replica."""
        outcomes = {name: self._sums["admissions_total", name] for name in ("admitted", "queued", "refused", "resumed")}
        dropped = {label: num for (name, label), num in self._sums.items() if name == "frames_dropped_total"}
        return outcomes | {
            "recovered": self._sums["recoveries_total", ""],
            "frames_in": self._sums["frames_in_total", ""],
            "frames_out": self._sums["frames_out_total", ""],
            "dropped": dropped,
        }

    def _tallied(self, name: str, record: Callable[..., None]) -> Callable[..., None]:
        def record_both(value: float, *labels: str) -> None:
            if value:
                self._sums[name, "".join(labels)] += int(value)
            record(value, *labels)

        return record_both


def known_code(code: str) -> str:
    """A code or reason as a label: one of a fixed set, `other` if it is not in that."""
    return code if code in KNOWN else "other"
