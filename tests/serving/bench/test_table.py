"""The tables of made-up runs."""

import json

import pytest

from serving.bench import report as bench_report
from serving.bench import table as bench_table
from serving.bench.log import Kill, Log, Memory, Newcomer, Output, Plan, SessionLog
from serving.line import Event, ServerError

MACHINE = {"cores": 2, "cpu": "Some CPU", "gpu": None, "python": "3.11", "torch": "2.13", "ray": "2.60"}


def run(delay_ms=500.0, num_sessions=1, log=None, input_fps=25.0, **plan):
    outputs = [Output(1000.0 + 100 * number, delay_ms) for number in range(90)]
    sessions = [SessionLog(outputs) for _ in range(num_sessions)]
    plan = Plan(num_sessions, 10.0, input_fps, **plan)
    return bench_report.figures(Log(plan, 4, 0.0, 10_000.0, sessions, **(log or {})))


def killed_run():
    events = [Event(2100.0, "recovering", ""), Event(3000.0, "recovered", {"restart": 600.0, "weights": 90.0})]
    outputs = [Output(1000.0 + 100 * number, 500.0) for number in [*range(11), *range(25, 90)]]
    kills = [Kill("denoise", 1, 2000.0, frozenset()), Kill("manager", 2, 8000.0, frozenset())]
    plan = Plan(1, 10.0, 25.0, kill="all", num_kills=2)
    return bench_report.figures(Log(plan, 4, 0.0, 10_000.0, [SessionLog(outputs, events)], kills))


def text(*runs):
    return bench_table.as_text({"machine": MACHINE, "runs": list(runs)})


def test_every_run_has_its_row_under_the_machine():
    lines = text(run(), run(num_sessions=2)).splitlines()
    assert lines[0] == "2 cores of Some CPU, GPU: none; python 3.11, torch 2.13, ray 2.60"
    assert [line.split("  ")[0] for line in lines[3:5]] == ["1 session", "2 sessions"]
    assert lines[3].split()[2:7] == ["9.9", "9.9", "500", "500", "500"]


def test_an_overloaded_run_is_set_against_the_one_with_the_least_input():
    told = text(run(), run(overload=1.0, input_fps=20.0), run(delay_ms=640.0, overload=3.0, input_fps=60.0))
    assert "1 session, input x3: p95 +140 ms against that with 20.0 frames a second, a chunk takes 404 ms" in told
    assert "input x1: p95" not in told
    told = text(run(), run(delay_ms=640.0, overload=3.0, input_fps=60.0))
    assert "p95 +140 ms against that with 25.0 frames a second" in told


def test_memory_growth_is_told_where_it_is_known():
    memory = [Memory(5.0 * number, 1000.0 + number, None) for number in range(40)]
    loaded = run(overload=3.0, input_fps=60.0, log={"memory": memory})
    assert "memory +2." in text(run(overload=1.0, input_fps=20.0), loaded)


def test_kills_are_told_by_what_was_killed_with_their_parts():
    lines = text(killed_run()).splitlines()
    assert any("2 kills, 1 interruptions of sessions, 0 not over in time" in line for line in lines)
    [row] = [line.split() for line in lines if line.startswith("denoise")]
    assert row == ["denoise", "1", "1", "100", "600", "-", "90", "-", "-", "1500", "1500", "1500"]
    [row] = [line.split() for line in lines if line.startswith("manager")]
    assert row == ["manager", "1", "0", *["-"] * 8, "100"]


def test_a_newcomer_is_told_with_what_it_did_to_each_of_the_others():
    newcomer = Newcomer(5000.0, (1, 150.0), 10_800.0)
    told = text(run(num_sessions=2, has_newcomer=True, log={"newcomer": newcomer})).splitlines()[-1]
    assert told.startswith("2 sessions, one more: told to wait at position 1, for 150 s")
    assert "p95 was 1.00 1.00 times that before" in told and "ready 800 ms after" in told


def test_bad_clients_and_errors_are_told():
    beside = run(log={"bad_clients": {"flood attempts": 3}}, has_bad_clients=True) | {"p95_ratio": 1.1234}
    assert "1 session, bad clients: p95 is 1.12 times that without" in text(beside)
    failed = Log(Plan(1, 1.0, 25.0), 4, 0.0, 1000.0, [SessionLog(error=ServerError("it broke", "internal"))])
    assert "error in 1 session: session 0: internal: it broke" in text(bench_report.figures(failed))


@pytest.mark.parametrize("log", [{}, {"bad_clients": {}}])
def test_a_run_of_which_nothing_is_known_has_dashes(log):
    nothing = bench_report.figures(Log(Plan(1, 1.0, 25.0, kill="all", num_kills=1), 4, 0.0, 1000.0, [], **log))
    assert " - " in text(json.loads(json.dumps(nothing)))
