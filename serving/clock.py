"""How far a client's clock is from the server's: a value, renewed by every ping. Pure; called by `serving.session`.

A ping is stamped by the client and by the server. What lies between is the clocks' offset and the way here, which is
taken as half of the way there and back that the client has measured with the pong before. The least uncertain ping
counts; with time it becomes uncertain itself, since clocks drift.
"""

from __future__ import annotations

from dataclasses import dataclass

DRIFT = 1e-4
"""Two clocks come apart by at most so much of the time that passes."""
UNKNOWN_WAY_MS = 1000.0
"""The uncertainty of a ping that says nothing of the way there and back."""


@dataclass(frozen=True)
class Clock:
    """The server's clock minus the client's, as well as it is known."""

    offset_ms: float
    error_ms: float
    """The offset may be wrong by so much."""
    at_ms: float
    """When it was estimated, on the server's clock."""


def hear(clock: Clock | None, client_ms: float, server_ms: float, rtt_ms: float | None) -> Clock:
    """The clock after a ping that left at `client_ms`, arrived at `server_ms`, and knows of a way of `rtt_ms`."""
    way_ms = 0.0 if rtt_ms is None else rtt_ms / 2
    heard = Clock(server_ms - client_ms - way_ms, UNKNOWN_WAY_MS if rtt_ms is None else way_ms, server_ms)
    if clock is None or heard.error_ms <= clock.error_ms + DRIFT * (server_ms - clock.at_ms):
        return heard
    return clock


def client_time_ms(clock: Clock, server_ms: float) -> float:
    """What the client's clock says when the server's says `server_ms`."""
    return server_ms - clock.offset_ms
