"""What a run of the load generator writes down while it lasts; `serving.bench.report` makes figures of it. Pure.

Times in ms are on the client's clock (`serving.line.now_ms`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from serving.line import Event
from stages.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What one run is to be."""

    num_sessions: int
    seconds: float
    """With kills the run lasts until all of them are over, but no less than this."""
    input_fps: float
    """Driving frames a second that each session sends."""
    overload: float | None = None
    """All sessions together send so many times what the server makes for one session."""
    kill: str | None = None
    """A stage, `manager`, `replica`, or `all` for each of them in turn."""
    num_kills: int = 0
    has_bad_clients: bool = False
    has_newcomer: bool = False
    """All places are taken, and halfway one more comes."""

    @property
    def name(self) -> str:
        """The run in a few words."""
        words = [f"{self.num_sessions} session{'s' if self.num_sessions > 1 else ''}"]
        words += [f"input x{self.overload:g}"] if self.overload is not None else []
        words += [f"kill {self.kill}"] if self.kill else []
        words += ["bad clients"] if self.has_bad_clients else []
        return ", ".join(words + (["one more"] if self.has_newcomer else []))


@dataclass(frozen=True)
class Output:
    """One output frame."""

    received_ms: float
    delay_ms: float | None
    """From capture to receipt; None in a transition."""


@dataclass
class SessionLog:
    """What one session has lived through."""

    outputs: list[Output] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    """What happened beside frames: the client's own list."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Driving frames that were due and not used: the server's reasons, and `unsent` (no connection, full socket)."""
    num_checked: int = 0
    num_wrong: int = 0
    """Of the output frames that were looked at, those that show another session's portrait."""
    error: UserError | None = None
    """Why the session ended before the run did."""


@dataclass(frozen=True)
class Kill:
    """One process that was killed."""

    what: str
    pid: int
    at_ms: float
    sessions: frozenset[int]
    """Numbers of the sessions whose sockets it held: of a replica; a stage or the manager holds none."""


@dataclass
class Newcomer:
    """Who comes when all places are taken."""

    came_ms: float
    waiting: tuple[int, float] | None = None
    """Position in the line and estimate in seconds, as it was told first; None: it was let in at once."""
    ready_ms: float | None = None
    """When it got its place."""


@dataclass(frozen=True)
class Memory:
    """The server's memory at one time."""

    t_s: float
    server_mb: float
    """Ingress replicas, members and the manager together."""
    ray_mb: float | None
    """Ray's own processes; None where they cannot be seen."""


@dataclass
class Log:
    """All of one run."""

    plan: Plan
    chunk_frames: int
    started_ms: float
    ended_ms: float
    """0 until the run is over. What comes later is not counted."""
    sessions: list[SessionLog]
    kills: list[Kill] = field(default_factory=list)
    num_not_recovered: int = 0
    """Sessions, over all kills, that got no new frames in time."""
    memory: list[Memory] = field(default_factory=list)
    bad_clients: Mapping[str, int] | None = None
    """What the bad clients beside these sessions did; None: there were none."""
    newcomer: Newcomer | None = None
    client_cpu_s: float = 0.0
    """Time that this process itself has computed."""
    error: UserError | None = None
    """Why the run was not what its plan says."""
