"""What one ingress replica knows of itself: its sessions and its counts. No Ray; used by routes and application."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from typing import Any

from cluster.metrics import rss_mb
from serving.metrics import IngressMetrics, Tally
from serving.session import Session

STATES = ("live", "idle", "queued", "recovering")


class Replica:
    """The sessions of one replica, from hello to end."""

    def __init__(self, name: str, metrics: IngressMetrics):
        self.name = name
        self.sessions: set[Session] = set()
        self.draining = asyncio.Event()
        self._tally = Tally()
        self.metrics = self._tally.along(metrics)

    def describe(self) -> dict[str, Any]:
        """For the manager, which puts the house's status together; renews the gauges on the way."""
        streaming = [session for session in self.sessions if session.stream is not None]
        states = Counter(session.state for session in self.sessions if session.stream is not None or session.is_queued)
        for state in STATES:
            self.metrics.sessions(states[state], state)
        memory_mb = rss_mb()
        self.metrics.replica_rss_mb(memory_mb)
        return {
            "id": self.name,
            "pid": os.getpid(),
            "rss_mb": memory_mb,
            "num_sessions": len(streaming),
            "sessions": [session.status(self.name) for session in streaming],
            "counts": self._tally.counts(),
        }

    async def announce_draining(self) -> None:
        """Tells all clients to go to another replica, and those too who only now become ready."""
        self.draining.set()
        await asyncio.gather(*(session.announce_draining() for session in self.sessions))
