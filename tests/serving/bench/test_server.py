"""The load generator's own server: what it is started with, and that nothing of it is left. No server is started."""

import asyncio
import os
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from serving.bench import server as bench_server
from serving.bench.machine import gpu_names, machine, processes_of, tree_rss_mb, version
from serving.bench.server import Server, ServerNotReady, server_environment
from serving.settings import Settings


def test_pages_are_found_beside_the_stream():
    assert Server("ws://127.0.0.1:8123/v1/stream").page("/v1/status") == "http://127.0.0.1:8123/v1/status"
    assert Server("wss://a.example/v1/stream").page("/readyz") == "https://a.example/readyz"


def test_the_configuration_is_serves_own_and_its_settings_are_known():
    config = yaml.safe_load(yaml.safe_dump(bench_server.serve_config(8123, {"num_replicas": 2, "target_fps": 1})))
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}
    [application] = config["applications"]
    assert application["import_path"] == "serving:app"
    assert Settings(**application["args"]).num_replicas == 2


def test_what_was_set_for_another_ray_or_another_server_does_not_reach_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    monkeypatch.setenv("PERSONALIVE_WEIGHTS", "/elsewhere")
    monkeypatch.setenv("LANG", "C.UTF-8")
    environment = server_environment(tmp_path, haproxy=False)
    assert not {"RAY_ADDRESS", "PERSONALIVE_WEIGHTS", "RAY_SERVE_ENABLE_HA_PROXY"} & environment.keys()
    assert (environment["RAY_TMPDIR"], environment["RAY_AUTH_MODE"]) == (str(tmp_path), "disabled")
    assert environment["LANG"] == "C.UTF-8"


def test_haproxy_is_told_not_to_cut_sockets_after_two_minutes(tmp_path):
    environment = server_environment(tmp_path, haproxy=True)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert int(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= 86_400


def test_a_server_is_stopped_with_all_that_it_has_started():
    stubborn = "trap '' INT; sleep 60 & sleep 60 & wait"
    process = subprocess.Popen(["bash", "-c", stubborn], start_new_session=True)
    while len(processes_of(process.pid)) < 3:
        time.sleep(0.01)
    family = processes_of(process.pid)
    bench_server.stop(process, stop_s=0.2)
    assert len(family) == 3 and not psutil.wait_procs(family, timeout=5)[1]


def test_a_server_heeds_interrupts_also_when_its_starter_ignores_them():
    code = (
        "import signal, subprocess, sys\n"
        "from serving.bench.server import heed_interrupts\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "process = subprocess.Popen(['sleep', '60'], preexec_fn=heed_interrupts)\n"
        "process.send_signal(signal.SIGINT)\n"
        "sys.exit(process.wait(timeout=20) != -signal.SIGINT)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_server_that_ends_while_it_starts_is_an_error_with_the_end_of_its_log(tmp_path):
    (tmp_path / "log").write_text("the weights are nowhere")
    process = subprocess.Popen(["false"])
    process.wait()
    with pytest.raises(ServerNotReady, match=r"ended while it started.*\n.*weights are nowhere"):
        bench_server.wait_until_ready(Server("ws://127.0.0.1:9/v1/stream"), process, tmp_path / "log")


def test_memory_is_that_of_named_processes_and_the_rest_is_rays():
    code = "import sys, time; data = bytearray(60_000_000); print(1, flush=True); time.sleep(60)"
    script = 'exec -a ray::Member:motion "$1" -c "$0" & exec -a ray::IDLE "$1" -c "$0" & wait'
    # Python itself: a wrapper that is called python would take the title away. It then finds its library by PYTHONHOME.
    command = ["bash", "-c", script, code, os.path.realpath(sys.executable)]
    root = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONHOME": sys.base_prefix})
    try:
        root.stdout.read(4)
        server_mb, ray_mb = tree_rss_mb(root.pid)
    finally:
        bench_server.stop(root, stop_s=0.1)
    assert 60 < server_mb < 120 and 60 < ray_mb < 140
    assert tree_rss_mb(root.pid) == (0, 0)


def test_memory_that_a_house_tells_counts_what_is_known():
    house = {"members": [{"rss_mb": 400.5}, {"rss_mb": None}], "replicas": [{"rss_mb": 100.0}], "manager": None}
    assert bench_server.told_rss_mb(house) == 500.5
    assert bench_server.told_rss_mb({}) == 0


async def test_a_running_server_tells_its_status_and_its_memory(echo_server):
    server = Server((await echo_server()).url)
    assert (await asyncio.to_thread(bench_server.status, server))["ready"] is True
    assert (await asyncio.to_thread(bench_server.memory, server, 2.0)).server_mb > 10
    assert bench_server.status(Server("ws://127.0.0.1:9/v1/stream")) is None


def test_the_machine_is_named_with_the_versions_that_are_installed():
    named = machine()
    assert named["cores"] >= 1 and named["cpu"] and named["ray"] == version("ray")
    assert named["gpu"] == gpu_names()
    assert version("no-such-package") is None
