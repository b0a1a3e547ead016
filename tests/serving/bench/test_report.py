"""Figures of made-up runs, worked out by hand."""

from collections import Counter

import pytest

from serving.bench import report as bench_report
from serving.bench.log import Kill, Log, Memory, Output, Plan, SessionLog
from serving.line import Event, ServerError, UnreachableError


def steady(num_frames, every_ms=100.0, delay_ms=500.0, first_ms=1000.0):
    """Frames at even distances."""
    return [Output(first_ms + number * every_ms, delay_ms) for number in range(num_frames)]


def log_of(sessions, seconds=10.0, started_ms=0.0, **more):
    plan = Plan(num_sessions=len(sessions), seconds=seconds, input_fps=25.0)
    return Log(plan, 4, started_ms, started_ms + seconds * 1000, sessions, **more)


def recoveries(kills, *sessions):
    return list(bench_report.recoveries(kills, sessions))


def test_rates_and_delays_are_per_session_and_over_all():
    slow = SessionLog(steady(45, every_ms=200, delay_ms=900))
    run = bench_report.figures(log_of([SessionLog(steady(90)), slow]))
    assert run["fps"] == [pytest.approx(89 / 9, abs=0.01), pytest.approx(44 / 9, abs=0.01)]
    assert run["total_fps"] == pytest.approx(sum(run["fps"]), abs=0.01)
    assert run["delay_ms_per_session"][1] == {"p50": 900, "p95": 900, "p99": 900}
    assert run["delay_ms"]["p50"] == 500 and run["delay_ms"]["p95"] == 900
    assert run["chunk_period_ms"] == pytest.approx(4000 / (run["total_fps"] / 2), abs=0.1)


def test_frames_of_the_transition_have_a_rate_and_no_delay():
    transition = [Output(100.0 * number, None) for number in range(10)]
    run = bench_report.figures(log_of([SessionLog(transition + steady(90, delay_ms=400))]))
    assert run["fps"] == [9.9]
    assert run["delay_ms"]["p50"] == 400 and run["per_10_s"][0]["delay_ms"]["p99"] == 400


def test_frames_behind_the_end_count_for_nothing():
    run = bench_report.figures(log_of([SessionLog([*steady(90), *steady(50, first_ms=10_001, delay_ms=9000)])]))
    assert run["fps"] == [pytest.approx(89 / 9, abs=0.01)]
    assert run["delay_ms"]["p99"] == 500


def test_a_session_that_falls_silent_gets_slow_and_not_short():
    run = bench_report.figures(log_of([SessionLog(steady(10))]))
    assert run["fps"] == [1.0]


def test_a_run_without_one_frame_has_figures_too():
    run = bench_report.figures(log_of([SessionLog(error=ServerError("it went", "internal"))]))
    assert run["fps"] == [0.0] and run["delay_ms"]["p95"] is None and run["jitter_ms"] is None
    assert run["chunk_period_ms"] is None and run["server_rss_mb"] == {"start": None, "end": None}
    assert run["errors"] == [{"session": 0, "code": "internal", "message": "it went"}]
    assert bench_report.figures(log_of([]))["total_fps"] == 0


def test_jitter_is_how_far_gaps_are_from_their_sessions_median():
    def jitter(*sessions):
        return bench_report.figures(log_of([SessionLog(outputs) for outputs in sessions]))["jitter_ms"]

    assert jitter(steady(50), steady(20, every_ms=300)) == 0
    assert jitter([Output(at_ms, 1.0) for at_ms in (0, 100, 200, 300, 400, 700)]) == pytest.approx(160)


def test_drops_add_up_over_sessions():
    first = SessionLog(dropped=Counter(surplus=3, unsent=2))
    second = SessionLog(dropped=Counter(surplus=4, stale=1))
    assert bench_report.figures(log_of([first, second]))["dropped"] == {"stale": 1, "surplus": 7, "unsent": 2}


def test_a_killed_members_recovery_lasts_until_the_picture_goes_on():
    still_on_the_way = [Output(2100.0, 500.0)]
    session = SessionLog(
        [*steady(11), *still_on_the_way, *steady(5, first_ms=6500)],
        [Event(2050.0, "recovering", ""), Event(6400.0, "recovered", {"restart": 3000.0, "weights": 400.0})],
    )
    [entry] = recoveries([Kill("denoise", 77, 2001.0, frozenset())], session)
    whole = {"kill": "denoise", "pid": 77, "session": 0, "detect_ms": 49.0, "total_ms": 4499.0}
    parts = {"restart_ms": 3000.0, "imports_ms": None, "weights_ms": 400.0, "restore_ms": None, "first_frame_ms": None}
    assert entry == whole | parts


def test_a_killed_replicas_recovery_begins_with_the_dropped_socket():
    session = SessionLog(
        [*steady(11), *steady(5, first_ms=4000)],
        [Event(2030.0, "lost", ""), Event(3500.0, "reconnected", {"resumed": True})],
    )
    [entry] = recoveries([Kill("replica", 5, 2001.0, frozenset({0}))], session)
    assert (entry["detect_ms"], entry["total_ms"], entry["restart_ms"]) == (29.0, 1999.0, None)


def test_a_session_that_was_not_interrupted_has_no_recovery():
    assert recoveries([Kill("manager", 5, 1500.0, frozenset())], SessionLog(steady(20))) == []


def test_each_kill_has_its_own_recoveries():
    kills = [Kill("denoise", 1, 2000.0, frozenset()), Kill("decode", 2, 5000.0, frozenset())]
    events = [Event(2010.0, "recovering", ""), Event(3000.0, "recovered", {}), Event(5020.0, "recovering", "")]
    first, second = recoveries(kills, SessionLog(steady(20, first_ms=3100), events))
    assert (first["kill"], first["total_ms"]) == ("denoise", 1100.0)
    assert (second["kill"], second["detect_ms"], second["total_ms"]) == ("decode", 20.0, None)


def test_the_longest_time_without_a_frame_counts_those_too_who_were_told_of_nothing():
    told = SessionLog([*steady(11), *steady(30, first_ms=3000)], [Event(2050.0, "recovering", "")])
    untold = SessionLog([*steady(11), *steady(5, first_ms=4200)])
    kills = [Kill("decode", 1, 2010.0, frozenset()), Kill("manager", 2, 4500.0, frozenset())]
    first, second = bench_report.kill_gaps(kills, [told, untold], 6000.0)
    assert (first["kill"], first["longest_gap_ms"]) == ("decode", 2200.0)
    assert (second["kill"], second["longest_gap_ms"]) == ("manager", 1400.0)
    assert [gap["longest_gap_ms"] for gap in bench_report.kill_gaps(kills, [], 6000.0)] == [None, None]


def test_kill_to_next_frame_sums_up_what_came_to_its_end():
    assert bench_report.middle_and_worst([1000.0, None, 3000.0, 2000.0]) == {
        "median": 2000.0,
        "p95": pytest.approx(2900.0),
        "max": 3000.0,
    }
    assert bench_report.middle_and_worst([None])["median"] is None


def test_a_closed_socket_counts_unless_its_replica_was_the_one_killed():
    kills = [Kill("replica", 5, 2000.0, frozenset({0})), Kill("manager", 6, 4000.0, frozenset())]

    def num_closed(number, *times_ms):
        sessions = [SessionLog(), SessionLog()]
        sessions[number].events += [Event(at_ms, "lost", "") for at_ms in times_ms]
        return bench_report.num_closed_by_server(kills, sessions)

    assert num_closed(0, 2100.0) == 0
    assert num_closed(1, 2100.0) == 1
    assert num_closed(0, 1900.0) == 1
    assert num_closed(0, 4100.0) == 1
    assert num_closed(0, 2100.0, 3000.0) == 1


def test_a_session_that_the_server_ended_counts_as_a_closed_socket_once():
    lost = [Event(2100.0, "lost", "")]
    came_back = [*lost, Event(2500.0, "reconnected", {"resumed": True})]
    kills = [Kill("replica", 5, 2000.0, frozenset({0}))]

    def num_closed(error, events):
        return bench_report.num_closed_by_server(kills, [SessionLog(events=events, error=error)])

    assert num_closed(ServerError("failed", "internal"), []) == 1
    assert num_closed(ServerError("failed", "internal"), came_back) == 1
    assert num_closed(ServerError("all places are taken", "busy"), lost) == 0
    assert num_closed(UnreachableError("nobody there"), lost) == 0


def test_memory_growth_is_counted_from_the_first_minute_on():
    def growth(*megabytes, every_s=5.0):
        return bench_report.growth_after_first_minute(
            [Memory(number * every_s, mb, None) for number, mb in enumerate(megabytes)]
        )

    assert growth(*[500] * 12, *[1000] * 10, *[1010] * 10) == pytest.approx(0.01)
    assert growth(*[500] * 12, *[1000] * 20) == 0
    assert growth(*[500] * 12) is None


def test_memory_of_the_server_and_of_ray_are_told_apart():
    run = bench_report.figures(log_of([], memory=[Memory(0.0, 900.0, 400.0), Memory(5.0, 910.5, 401.0)]))
    assert run["server_rss_mb"] == {"start": 900.0, "end": 910.5}
    assert run["ray_rss_mb"] == {"start": 400.0, "end": 401.0}
    assert run["rss_mb"] == [[0.0, 900.0], [5.0, 910.5]]


def test_bad_clients_are_measured_by_what_they_do_to_the_good_ones_p95():
    alone = bench_report.figures(log_of([SessionLog(steady(90, delay_ms=1000))]))
    beside = log_of([SessionLog(steady(90, delay_ms=1150))], bad_clients={"flood": 3})
    run = bench_report.figures(beside, alone)
    assert (run["p95_ratio"], run["bad_clients"]) == (1.15, {"flood": 3})
    assert alone["p95_ratio"] is None and alone["bad_clients"] is None
    assert bench_report.p95_ratio({"p95": None}, {"p95": 900.0}) is None
