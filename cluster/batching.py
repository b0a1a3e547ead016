"""Which chunks form the next denoiser call: pure functions, no Ray, no torch. Called by `cluster.engine`.

One denoiser call moves every window in it down by one level, so a session can take part once per call, and its chunks
must come in their order. A session that waits for a keyframe sits out: its next chunk has to see that keyframe.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from cluster.errors import StaleChunk, TooManyChunks
from cluster.messages import SessionKey

MAX_PENDING = 16
"""Chunks that one session may have waiting. A session keeps a few in flight; more is a caller that never waits."""


@dataclass(frozen=True)
class Pending:
    """A chunk that waits for its turn."""

    session: SessionKey
    number: int
    due_s: float
    """The earliest goes first: when its result should be there, on the wall clock."""


@dataclass(frozen=True)
class Progress:
    """How far a session is."""

    next_number: int = 0
    awaits_keyframe: bool = False

    def takes(self, number: int) -> bool:
        """Whether this chunk may enter the session's window now."""
        return number == self.next_number and not self.awaits_keyframe


def check_number(number: int, progress: Progress, pending: Collection[int]) -> None:
    """Raises StaleChunk for a chunk that came before, TooManyChunks when no more can wait; early ones are fine."""
    if number < progress.next_number or number in pending:
        raise StaleChunk(f"chunk {number} came before; the next one is {progress.next_number}")
    if len(pending) >= MAX_PENDING:
        raise TooManyChunks(f"{len(pending)} chunks of this session are waiting; send more when results come back")


def next_batch(
    pending: Iterable[Pending], progress: Mapping[SessionKey, Progress], max_batch: int
) -> tuple[Pending, ...]:
    """The chunks of the next call: at most one per session and `bucket` in all, the earliest deadline first.

    Fair, since deadlines pass: who was left out of a call is early in the next one.
    """
    ready = [chunk for chunk in pending if progress[chunk.session].takes(chunk.number)]
    return tuple(sorted(ready, key=lambda chunk: (chunk.due_s, chunk.session))[: bucket(len(ready), max_batch)])


def bucket(num_ready: int, max_batch: int) -> int:
    """How many go into the next call: 1, 2, 4, …, so that there are few sizes to compile. 0 where nothing is ready."""
    num = min(num_ready, max_batch)
    return 1 << num.bit_length() - 1 if num else 0
