"""What members, manager and sessions say to each other beyond the stages' own messages. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from stages.messages import MotionState, Pixels, WindowSnapshot

M = TypeVar("M")
SessionKey = tuple[str, int]
"""(session id, epoch): the epoch counts the lives that a session had on denoise members."""
CallMs = Mapping[str, Mapping[int, float]]
"""By stage and number of sessions in it: how long one call takes."""


@dataclass(frozen=True)
class Staged(Generic[M]):
    """A message on its way through the stages, with the time it has cost so far."""

    message: M
    no_face: tuple[bool, ...]
    """Of the driving frames that came in with this chunk."""
    stage_ms: dict[str, float]
    """Work per stage, and waiting for its turn as `<stage>_wait`."""


@dataclass(frozen=True)
class DecodedChunk:
    """What a session gets for each of its chunks."""

    frames: Pixels
    """(chunk_frames, s, s, 3) of the driving chunk num_levels - 1 calls ago; the first of them are the transition."""
    no_face: tuple[bool, ...]
    """Of the driving frames of this call's input."""
    stage_ms: dict[str, float]
    """Work per stage (motion, denoise, decode), and waiting for its turn as `<stage>_wait`."""


@dataclass(frozen=True)
class SessionSnapshot:
    """All that a session needs, besides its portrait, to go on with chunk number `window.num_calls` on any members."""

    window: WindowSnapshot
    motion: MotionState


@dataclass(frozen=True)
class Life:
    """One process of a member, and what its start has cost."""

    id: str
    pid: int
    node: str
    created_s: float
    """On the wall clock: when the process was there."""
    imports_ms: float = 0.0
    weights_ms: float = 0.0


@dataclass(frozen=True)
class SessionRecord:
    """A life of a session as its denoise member keeps it: for a manager that has lost its table."""

    session: str
    epoch: int
    lease: str
    members: Mapping[str, str]
    """Names by stage."""

    @property
    def key(self) -> SessionKey:
        return self.session, self.epoch


@dataclass(frozen=True)
class MemberReport:
    """What a member tells its manager every second."""

    life: Life
    rss_mb: float
    busy_s: Mapping[str, float]
    """By stage: all the time at work since its start."""
    call_ms: CallMs
    stuck_s: float
    """How long the longest running call has been running by now."""
    sessions: tuple[SessionRecord, ...]


@dataclass(frozen=True)
class SeatRequest:
    """What a replica asks the manager for."""

    session: str
    lease: str
    since_s: float = 0.0
    """A newcomer's arrival on the wall clock: its place in the line."""
    epoch: int | None = None
    """Of the life that the asking replica knows; None: a newcomer, or one that comes back with its token."""
    lost: str | None = None
    """Id of the member's actor that was found dead."""


@dataclass(frozen=True)
class Route:
    """The members that work for one session, as Ray actor handles."""

    motion: Any
    reference: Any
    denoise: Any
    decode: Any
    epoch: int
    names: Mapping[str, str] = field(default_factory=dict)
    """By stage."""
    lives: Mapping[str, Life] = field(default_factory=dict)
    """By stage, as last heard of."""
    previous: Any = None
    """The denoise member on which the session lived before, if it was not lost."""


@dataclass(frozen=True)
class Waiting:
    """Instead of a Route: all places are taken."""

    position: int
    """1: the next one."""
    estimate_s: float
