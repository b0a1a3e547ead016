"""The command line, and whole measurements against a real socket whose pipeline echoes."""

import json
from pathlib import Path

import numpy as np
import pytest

from serving.bench import runs as bench_runs
from serving.bench.__main__ import ALL_ADMITTED_FPS, main, parse_args, server_settings, setting
from serving.bench.runs import measure, measure_beside_bad_clients
from serving.bench.server import Server
from serving.settings import Settings
from stages.video import VideoWriter


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(bench_runs, "PAUSE_S", 0.0)


@pytest.fixture
def clip(tmp_path):
    """A second of grey."""
    path = tmp_path / "driving.mp4"
    with VideoWriter(path) as writer:
        for number in range(25):
            writer.write(np.full((64, 64, 3), 40 + 5 * number, np.uint8), number / 25)
    return path


async def runs(echo_server, clip, *arguments, num_good=None, **behaviour):
    """What is measured of an echoing server; `num_good`: of such sessions beside bad clients."""
    server = await echo_server(chunk_s=0.02, **behaviour)
    args = parse_args(["--url", server.url, "--driving", str(clip), "--fps", "50", *arguments])
    figures = setting(args)
    if num_good is None:
        await measure(args, Server(server.url), figures)
    else:
        await measure_beside_bad_clients(args, Server(server.url), figures, num_good)
    assert json.loads(json.dumps(figures)) == figures
    return figures["runs"]


async def test_every_number_of_sessions_gets_a_run_and_one_for_each_overload_of_one_sessions_rate(echo_server, clip):
    measured = await runs(echo_server, clip, "--sessions", "1,2", "--overload", "1,3", "--seconds", "1")
    plans = [(run["sessions"], len(run["fps"]), run["overload"]) for run in measured]
    assert plans == [(1, 1, None), (2, 2, None), (1, 1, 1.0), (1, 1, 3.0), (2, 2, 1.0), (2, 2, 3.0)]
    one_fps = measured[0]["total_fps"]
    expected_fps = [50, 50, one_fps, 3 * one_fps, one_fps / 2, 3 * one_fps / 2]
    assert [run["input_fps"] for run in measured] == [pytest.approx(fps, abs=0.01) for fps in expected_fps]
    assert not any(run["kill"] or run["bad_clients"] or run["errors"] for run in measured)


async def test_overload_alone_measures_one_session_first(echo_server, clip):
    reference, twice = await runs(echo_server, clip, "--overload", "2", "--seconds", "1")
    assert (reference["overload"], twice["overload"], twice["sessions"]) == (None, 2.0, 1)


async def test_good_sessions_are_measured_alone_and_beside_bad_clients(echo_server, clip):
    alone, beside = await runs(echo_server, clip, "--bad-clients", "--seconds", "2", num_good=2)
    assert (alone["sessions"], beside["sessions"]) == (2, 2)
    assert alone["bad_clients"] is None and sum(beside["bad_clients"].values()) > 0
    assert beside["p95_ratio"] == pytest.approx(beside["delay_ms"]["p95"] / alone["delay_ms"]["p95"], abs=0.001)


async def test_a_newcomer_is_a_run_with_as_many_sessions_as_there_are_places(echo_server, clip):
    (run,) = await runs(echo_server, clip, "--newcomer", "--seconds", "1", places=2)
    assert (run["sessions"], run["newcomer"]["position"], run["errors"]) == (2, 1, [])
    assert run["seconds"] == pytest.approx(2, abs=0.5)


async def test_what_has_been_measured_is_kept_in_a_file_after_every_run(echo_server, clip, tmp_path):
    out = tmp_path / "figures.json"
    measured = await runs(echo_server, clip, "--sessions", "1,2", "--seconds", "0.2", "--out", str(out))
    kept = json.loads(out.read_text())
    assert kept["runs"] == measured and kept["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    "wrong",
    [
        ("--sessions", "0"),
        ("--sessions", "1,x"),
        ("--sessions", ""),
        ("--seconds", "0"),
        ("--seconds", "inf"),
        ("--overload", "1,-3"),
        ("--kill", "everything"),
        ("--kill", "all", "--kills", "0"),
        ("--kill", "all", "--url", "ws://127.0.0.1:8000/v1/stream"),
        ("--haproxy", "--url", "ws://127.0.0.1:8000/v1/stream"),
        ("--newcomer", "--overload", "3"),
        ("--spare-members", "-1"),
        ("--fps", "0"),
        ("--target-fps", "nan"),
        ("--out", "no/such/folder/out.json"),
    ],
)
def test_a_wrong_command_line_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as refused:
        parse_args(wrong)
    assert refused.value.code == 2 and "error:" in capsys.readouterr().err


def test_settings_of_the_own_server_are_known_to_it_and_let_everybody_in():
    settings = Settings(**server_settings(parse_args(["--spare-members", "1"]), ALL_ADMITTED_FPS))
    assert (settings.num_replicas, settings.target_fps, settings.spare_members) == (2, 1, 1)
    assert setting(parse_args(["--haproxy"]))["server"]["haproxy"] is True
    given = [server_settings(parse_args(arguments), None) for arguments in ([], ["--target-fps", "5"])]
    assert [Settings(**values).target_fps for values in given] == [Settings().target_fps, 5]


@pytest.mark.parametrize(("given", "meant"), [("tiny", "tiny"), ("out/weights", str(Path.cwd() / "out/weights"))])
def test_the_own_servers_weights_are_named_from_wherever_it_runs(given, meant):
    assert server_settings(parse_args(["--weights", given]), None)["weights"] == meant


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--driving", "/no/such/video.mp4"), "bad_video"),
        (("--url", "ws://127.0.0.1:9/v1/stream"), "no_connection"),
    ],
)
def test_what_cannot_begin_says_so_with_a_code(arguments, code, capsys):
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"error: {code}: ")
