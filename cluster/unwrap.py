"""From Ray's errors to ours. Used wherever a call to an actor is awaited: `cluster.pool` and `cluster.session`."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.errors import MemberLost, StageFailed
from stages.errors import UserError


def to_user_error(error: BaseException) -> UserError:
    """The error as it was raised in the member; MemberLost where the member itself, or what it held, is gone.

    A failed task hands its error to every task that takes its result, so the root may lie under several RayTaskErrors.
    """
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    if isinstance(error, UserError):
        return error
    if isinstance(error, RayError):
        lost = MemberLost(
            f"a member of the pool was lost while it worked for this session ({type(error).__name__}); open a new one"
        )
        lost.actor_id = error.actor_id if isinstance(error, RayActorError) else None
        return lost
    return StageFailed(f"a stage failed unexpectedly: {type(error).__name__}: {error}")
