"""How many sessions a pool can serve, and who waits for a place: pure, without Ray. Called by `cluster.pool`.

The promise: every session gets `target_fps`. A member works for all of its sessions in turn, so it has a place for one
more as long as one round of calls, at the times that were measured, fits into the time that a chunk lasts at that rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.batching import bucket
from cluster.messages import Waiting

HEADROOM = 0.9
"""Share of a chunk's time that a round of calls may take."""
EXPECTED_STAY_S = 300.0
"""How long people stay, before anyone has left."""
SMOOTHING = 0.2
"""Weight of the newest stay in the mean."""
FORGET_S = 5.0
"""Who waits asks again every second; whoever has not asked for so long has left the line."""


def num_places(
    members: Iterable[Mapping[str, Mapping[int, float]]],
    target_fps: float,
    chunk_frames: int,
    max_batch: int,
    max_sessions: int,
) -> int:
    """How many sessions these members can serve at `target_fps`, between 1 and `max_sessions` per member.

    `members`: for each, the ms of one call by stage and number of sessions. A stage has the places of all its members;
    the scarcest stage decides. One person is always served, as well as it goes. Reference works too rarely to count.
    """
    period_ms = HEADROOM * 1e3 * chunk_frames / target_fps
    by_stage: dict[str, int] = {}
    for stages in members:
        for stage, call_ms in stages.items():
            if stage != "reference" and call_ms:
                places = max_sessions
                while places and round_ms(call_ms, places, max_batch) > period_ms:
                    places -= 1
                by_stage[stage] = by_stage.get(stage, 0) + places
    return max(1, min(by_stage.values(), default=1))


def round_ms(call_ms: Mapping[int, float], num_sessions: int, max_batch: int) -> float:
    """How long a stage works to serve so many sessions once, in as large calls as may be."""
    total_ms = 0.0
    while num := bucket(num_sessions, max_batch):
        total_ms += expected_ms(call_ms, num)
        num_sessions -= num
    return total_ms


def expected_ms(call_ms: Mapping[int, float], num: int) -> float:
    """The time of a call for `num` sessions: as measured, else in proportion to the nearest smaller one that was."""
    if num in call_ms:
        return call_ms[num]
    nearest = max((known for known in call_ms if known < num), default=min(call_ms))
    return call_ms[nearest] * num / nearest


@dataclass(frozen=True)
class Line:
    """Who waits for a place. Kept by the manager, and made anew from its clients' questions after its death."""

    since_s: Mapping[str, float] = field(default_factory=dict)
    """By session: when it came, on the wall clock."""
    asked_s: Mapping[str, float] = field(default_factory=dict)
    """By session: when it asked last, on the manager's clock."""
    stay_s: float = EXPECTED_STAY_S
    """Mean time from a session's seating to its end."""

    def ask(self, session: str, since_s: float, now_s: float) -> Line:
        """With this session in it, and without those that have stopped asking."""
        asked_s = {who: at_s for who, at_s in self.asked_s.items() if now_s - at_s < FORGET_S} | {session: now_s}
        first_s = self.since_s.get(session, since_s)
        return Line({who: self.since_s.get(who, first_s) for who in asked_s}, asked_s, self.stay_s)

    def without(self, session: str) -> Line:
        """After this session has a place, or has left."""
        since_s, asked_s = (
            {who: at for who, at in times.items() if who != session} for times in (self.since_s, self.asked_s)
        )
        return Line(since_s, asked_s, self.stay_s)

    def stayed(self, stay_s: float) -> Line:
        """After a session has ended."""
        return Line(self.since_s, self.asked_s, (1 - SMOOTHING) * self.stay_s + SMOOTHING * stay_s)

    def position(self, session: str) -> int:
        """From 1."""
        return 1 + sorted(self.since_s, key=lambda who: (self.since_s[who], who)).index(session)

    def waiting(self, session: str, places: int) -> Waiting:
        """What this session is told: with so many places, one becomes free every `stay_s / places` on average."""
        position = self.position(session)
        return Waiting(position, round(position * self.stay_s / places, 1))
