"""What members, manager and sessions say to each other beyond the stages' own messages. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from stages.messages import Pixels

M = TypeVar("M")
SessionKey = tuple[str, int]
"""(session id, epoch): the epoch counts the lives that a session had on denoise members."""


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
class Route:
    """The members that work for one session, as Ray actor handles."""

    motion: Any
    reference: Any
    denoise: Any
    decode: Any
    epoch: int


@dataclass(frozen=True)
class SessionRecord:
    """What a denoise member tells a manager that has lost its table."""

    session: str
    epoch: int
    lease: str
