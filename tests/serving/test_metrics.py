import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cluster.metrics import declarations
from serving.metrics import DROPS, ENDS, ERRORS, IngressMetrics, SessionMeter, Tally, known_code

ROOT = Path(__file__).parents[2]


@pytest.fixture
def told():
    """What was recorded, by metric and label."""
    return Counter()


@pytest.fixture
def metrics(told):
    def into(name):
        return lambda value, *labels: told.update({(name, *labels): value})

    return IngressMetrics(**{name: into(name) for name in declarations(IngressMetrics)})


def test_a_session_adds_what_its_counts_have_grown_by(metrics, told):
    meter = SessionMeter(metrics)
    meter.count(4, 0, {})
    meter.count(9, 4, {"stale": 2})
    meter.count(20, 8, {"stale": 2, "surplus": 7})
    meter.count(20, 8, {"stale": 2, "surplus": 7})
    assert +told == {
        ("frames_in_total",): 20,
        ("frames_out_total",): 8,
        ("frames_dropped_total", "stale"): 2,
        ("frames_dropped_total", "surplus"): 7,
    }


def test_two_sessions_add_up(metrics, told):
    for meter in (SessionMeter(metrics), SessionMeter(metrics)):
        meter.count(5, 3, {"unused": 1})
    assert told["frames_in_total",] == 10 and told["frames_dropped_total", "unused"] == 2


def test_a_recovery_is_counted_with_its_parts(metrics, told):
    SessionMeter(metrics).recovered({"restart": 800.0, "first_frame": 200.0})
    assert told == {
        ("recoveries_total",): 1,
        ("recovery_ms", "restart"): 800.0,
        ("recovery_ms", "first_frame"): 200.0,
    }


def test_what_a_session_ends_by_is_one_of_the_documented_codes_or_other(metrics, told):
    meter = SessionMeter(metrics)
    for code in ("bye", "flooding", "<made up by a client>"):
        meter.ended(code)
    assert told == dict.fromkeys([("session_ends_total", code) for code in ("bye", "flooding", "other")], 1)


def test_every_code_of_the_protocol_is_known_and_what_is_not_is_other():
    errors = (ROOT / "docs/protocol.md").read_text().split("## Errors")[1].split("##")[0]
    cells = re.findall(r"^\| (`.*?) \|", errors, re.M)
    documented = {code for cell in cells for code in re.findall(r"`(\w+)`", cell)}
    assert len(documented) > 20 and documented <= ERRORS
    assert {known_code(code) for code in documented | DROPS | ENDS} == documented | DROPS | ENDS
    assert known_code("user_error") == known_code("") == "other"


def test_the_tally_has_the_counts_of_the_status(metrics):
    tally = Tally()
    along = tally.along(metrics)
    assert tally.counts() == {
        **dict.fromkeys(["admitted", "queued", "refused", "resumed", "recovered", "frames_in", "frames_out"], 0),
        "dropped": {},
    }
    for outcome in ("admitted", "admitted", "queued", "refused", "resumed"):
        along.admissions_total(1, outcome)
    meter = SessionMeter(along)
    meter.count(10, 6, {"stale": 3, "surplus": 0})
    meter.recovered({})
    assert tally.counts() == {
        "admitted": 2,
        "queued": 1,
        "refused": 1,
        "resumed": 1,
        "recovered": 1,
        "frames_in": 10,
        "frames_out": 6,
        "dropped": {"stale": 3},
    }


def test_the_tally_passes_everything_on(metrics, told):
    along = Tally().along(metrics)
    along.frames_in_total(3)
    along.admissions_total(1, "admitted")
    along.delay_ms(250.0)
    along.sessions(2, "live")
    assert told == {
        ("frames_in_total",): 3,
        ("admissions_total", "admitted"): 1,
        ("delay_ms",): 250.0,
        ("sessions", "live"): 2,
    }


def test_without_ray_nothing_is_recorded_and_nothing_is_loaded():
    code = "import serving.metrics as m, serving.logs, serving.delays, sys\n"
    code += "m.SessionMeter(m.IngressMetrics()).count(3, 2, {'stale': 1})\nsys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
