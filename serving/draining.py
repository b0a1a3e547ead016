"""Whether Serve is about to stop the replica that this code runs in. Called by `serving.application` in every replica.

Ray Serve 2.60 tells a replica's code nothing when a drain begins: the lifespan of the routes ends with the last
request, and an open websocket is a request. Only the replica's own actor knows, in a private flag, which is read here.
From then on new requests go to other replicas. tests/serving/test_draining.py fails if a release of Ray keeps the flag
elsewhere; without it clients are not told, and lose their sockets when the drain ends.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

from ray._private import worker

logger = logging.getLogger("ray.serve")

POLL_S = 0.5


def is_draining() -> bool:
    """Whether this replica is being replaced or removed. False, and a warning once, where that cannot be known."""
    is_shutting_down = getattr(_own_replica(), "_shutting_down", None)
    if is_shutting_down is None:
        _warn_once()
    return bool(is_shutting_down)


async def until_draining(poll_s: float = POLL_S) -> None:
    """Returns when this replica begins to drain, at most `poll_s` later; for ever if that cannot be known."""
    while not is_draining():
        await asyncio.sleep(poll_s)


def _own_replica() -> Any:
    """What Serve runs in this process; None outside of a replica."""
    actors = getattr(worker.global_worker, "actors", {}).values()
    return next((actor._replica_impl for actor in actors if hasattr(actor, "_replica_impl")), None)


@functools.cache
def _warn_once() -> None:
    logger.warning("this is no Serve replica, or one of another Ray: clients will not be told before it is stopped")
