"""What can go wrong between a session and the pool. No torch, no Ray; used by all of `cluster` and by serving."""

from __future__ import annotations

from typing import Any

from stages.errors import UserError


class PoolFailed(UserError):
    """The pool cannot start, or has given up: weights that do not load, or a cluster that is too small."""

    code = "pool_failed"


class PoolFull(UserError):
    """A member already holds as many sessions as it may."""

    code = "pool_full"


class PoolBusy(UserError):
    """All places are taken, and the queue for them is full. Another try is worth it after `retry_s`."""

    code = "busy"

    def __init__(self, message: str, code: str | None = None, retry_s: float = 0.0):
        super().__init__(message, code)
        self.retry_s = retry_s

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.code, self.retry_s)


class MemberLost(UserError):
    """A member that worked for this session has died, and with it what it knew of the session."""

    code = "member_lost"
    actor_id: str | None = None
    """Of the dead member, in hexadecimal digits, where that is known. Stays in the process that found out."""


class SessionMoved(UserError):
    """The session goes on somewhere else: its client has come back with its token on another connection."""

    code = "session_moved"


class StaleChunk(UserError):
    """A chunk number came twice, or after its turn."""

    code = "stale_chunk"


class TooManyChunks(UserError):
    """A session has more chunks in flight than a member keeps."""

    code = "too_many_chunks"


class BadChunk(UserError):
    """Driving frames have another shape or type than the model needs."""

    code = "bad_chunk"


class SessionClosed(UserError):
    """The session was closed while it still had chunks in flight."""

    code = "session_closed"


class StageFailed(UserError):
    """A stage raised something that nobody expected; only the session that caused it ends."""

    code = "stage_failed"
