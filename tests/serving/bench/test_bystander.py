"""The figures of a run in which a replica was killed, without a server."""

import pytest

from serving.bench import bystander
from serving.bench.log import Kill, Log, Output, Plan, SessionLog
from serving.line import Event, UnreachableError

KILL_MS = 30_000.0
END_MS = 180_000.0


def a_session(until_ms=END_MS, gap=(0, 0), events=(), error=None):
    """One frame each half second, but for a gap."""
    times = [at_ms for at_ms in range(10_000, int(until_ms) + 1, 500) if not gap[0] < at_ms < gap[1]]
    return SessionLog([Output(at_ms, 100.0) for at_ms in times], list(events), error=error)


def a_run(*sessions, hit=frozenset({0})):
    kill = Kill("replica", 7, KILL_MS, hit)
    log = Log(Plan(len(sessions), 150, 3, kill="replica"), 4, 10_000.0, END_MS, list(sessions), [kill])
    return {"seconds": 150, "sessions": bystander.figures(log)}


def lost(at_ms):
    return Event(at_ms, "lost", "closed")


def test_a_bystander_who_notices_nothing():
    killed = a_session(gap=(30_000, 34_000), events=[lost(30_020), Event(30_900, "reconnected", {"resumed": True})])
    run = a_run(killed, a_session())
    assert run["sessions"][0]["next_frame_ms"] == 4000
    assert run["sessions"][1] == {
        "session": 1,
        "is_bystander": True,
        "fps_before": 2.0,
        "fps_after": 2.01,
        "longest_gap_before_ms": 500,
        "longest_gap_after_ms": 500,
        "last_frame_s": 150,
        "num_closed": 0,
        "next_frame_ms": None,
    }
    assert bystander.is_undisturbed(run)


@pytest.mark.parametrize(
    "session",
    [
        a_session(events=[lost(150_000), Event(150_500, "reconnected", {"resumed": True})]),
        a_session(until_ms=150_000),
        a_session(error=UnreachableError("gone")),
        SessionLog(),
    ],
    ids=["cut off later", "silent in the end", "ended", "never a frame"],
)
def test_a_bystander_who_was_disturbed(session):
    assert not bystander.is_undisturbed(a_run(a_session(events=[lost(30_020)]), session))


def test_the_longest_gap_counts_from_the_last_frame_before_the_kill_and_to_the_end():
    run = a_run(a_session(), a_session(gap=(29_000, 33_000)), a_session(until_ms=175_000))
    assert [session["longest_gap_after_ms"] for session in run["sessions"]] == [500, 4000, 5000]


def test_the_table_says_who_was_cut_off():
    run = a_run(a_session(events=[lost(30_020)]), a_session(until_ms=150_000))
    machine = {"cores": 2, "cpu": "a processor", "gpu": None, "python": "3", "torch": "2", "ray": "2"}
    text = bystander.as_text(run | {"machine": machine, "proxy": "HAProxy", "replaced_s": 3.5})
    assert "another replica was there after 3.5 s; bystanders WERE CUT OFF" in text
    assert "0, replica killed" in text and "1, bystander" in text
