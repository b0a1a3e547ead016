"""The load generator and the fuzzing on whole servers, in short, with a light model. What they measure is printed by
the commands; here is only what must hold however slow a machine is. Recorded results of the long runs: docs/service.md.
"""

import json
import subprocess
import sys

import pytest

from serving.bench.kills import STAGES
from serving.fuzz.bad_clients import KINDS

from .conftest import running_server

pytestmark = pytest.mark.system


def figures(module, *arguments):
    """A command's JSON."""
    command = [sys.executable, "-m", module, *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def bench(*arguments):
    """The runs of the load generator; none of them may have lost a session or mixed two up."""
    runs = figures("serving.bench", *arguments)["runs"]
    for run in runs:
        assert run["errors"] == []
        assert run["sockets_closed_by_server"] == 0
        assert run["frames_to_wrong_session"] == 0 < run["frames_checked"]
    return runs


ONE_PLACE = ("--target-fps", "1000")
"""One person always has a place, and at this rate no processor has one for a second."""
FAST_CAMERA = ("--fps", "150")
"""So many frames a second that a session gets what the machine can do, and not what it sends."""


@pytest.fixture(scope="module")
def house(light_weights):
    """A server that lets everybody in."""
    with running_server(num_replicas=2, target_fps=1, weights=light_weights) as server:
        yield server


def test_every_session_gets_its_share(house):
    # Long enough that a chunk more or less, and who opened first, do not count.
    one, four = bench("--url", house.stream, "--sessions", "1,4", "--seconds", "20", *FAST_CAMERA)
    assert len(four["fps"]) == 4 and min(four["fps"]) > max(four["fps"]) / 2
    assert four["total_fps"] > one["total_fps"] / 2


def test_three_times_the_input_is_dropped_and_delays_nobody(house):
    _, once, thrice = bench("--url", house.stream, "--overload", "1,3", "--seconds", "20", *FAST_CAMERA)
    assert thrice["input_fps"] == pytest.approx(3 * once["input_fps"], rel=0.01)
    # Twenty seconds at such a rate would leave forty seconds of work in a queue that kept it.
    assert thrice["delay_ms"]["p99"] < 2 * once["delay_ms"]["p95"] + 8 * thrice["chunk_period_ms"]
    # Two thirds of it, on a machine as fast in one minute as in the other.
    assert thrice["dropped"]["surplus"] > 0.2 * 20 * thrice["input_fps"]


def test_bad_clients_of_all_kinds_leave_those_who_have_places_alone(light_weights):
    alone, beside = bench("--weights", light_weights, "--bad-clients", "--sessions", "1", "--seconds", "15", *ONE_PLACE)
    assert {name.split()[0] for name in beside["bad_clients"]} == set(KINDS)
    assert alone["target_fps"] == beside["target_fps"] == 1000
    assert beside["total_fps"] > alone["total_fps"] / 2
    assert beside["p95_ratio"] < 2


def test_bad_clients_that_all_are_let_in_stop_nobody(house):
    alone, beside = bench("--url", house.stream, "--bad-clients", "--seconds", "15")
    told = beside["bad_clients"]
    assert told["flood flooding"] > 0
    # How many of the others come to an end in this time depends on the machine; that some reach the server does not.
    assert all(told[f"{kind} attempts"] > told.get(f"{kind} unreachable", 0) for kind in KINDS)
    assert beside["total_fps"] > alone["total_fps"] / 4
    assert beside["delay_ms"]["p99"] < 10_000


def test_broken_messages_get_typed_errors_and_a_good_client_keeps_its_frames(house):
    live = figures("serving.fuzz", "--messages", "0", "--url", house.stream, "--live", "300")["live"]
    assert live["failures"] == [] and live["messages"] >= 300
    assert live["counts"]["bad_header"] > 0 < live["counts"]["bad_frame"]
    assert live["good_frames"] > 20


def test_whatever_is_killed_every_session_streams_again(light_weights):
    (run,) = bench("--weights", light_weights, "--kill", "all", "--kills", "5", "--seconds", "5")
    assert [kill["kill"] for kill in run["kills"]] == ["motion", "denoise", "decode", "manager", "replica"]
    assert run["num_not_recovered"] == 0 and len(run["fps"]) == 3
    members_died = [recovery for recovery in run["recoveries"] if recovery["kill"] in STAGES]
    # A session between two chunks need not notice.
    assert {recovery["kill"] for recovery in members_died} == {"motion", "denoise", "decode"}
    assert all(recovery["first_frame_ms"] > 0 and recovery["total_ms"] > 100 for recovery in members_died)
    # A manager that dies interrupts nobody.
    assert not any(recovery["kill"] == "manager" for recovery in run["recoveries"])


def test_one_more_than_there_are_places_waits_in_line_and_gets_the_first_free_place(light_weights):
    (run,) = bench("--weights", light_weights, "--newcomer", "--seconds", "15", *ONE_PLACE)
    newcomer = run["newcomer"]
    assert newcomer["position"] == 1 and newcomer["estimate_s"] > 0
    assert newcomer["ready_after_leave_ms"] > 0
    assert all(session["ratio"] < 2 for session in newcomer["p95_ms"])
