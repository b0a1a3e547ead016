"""The machine that a benchmark ran on, and the memory of a server's processes. Called by `serving.bench`.

No Ray, no torch: their versions are read from what is installed, the GPU's name from its driver's tool.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from serving.abuse import SERVER_TITLES


def machine() -> dict[str, Any]:
    """What figures of speed depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": cpu_model(),
        "gpu": gpu_names(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
    }


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def gpu_names() -> str | None:
    """The names of all GPUs, with commas; None without one."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ", ".join(done.stdout.split("\n")).strip(", ") or None if done.returncode == 0 else None


def version(package: str) -> str | None:
    """Of an installed package; None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tree_rss_mb(root_pid: int) -> tuple[float, float]:
    """Memory of the processes under a `serve run`: ingress replicas, members and manager; and all of Ray's own."""
    server, ray = 0, 0
    for process in processes_of(root_pid):
        try:
            is_server = any(part.startswith(SERVER_TITLES) for part in process.cmdline()[:1])
            num_bytes = process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
        server, ray = (server + num_bytes, ray) if is_server else (server, ray + num_bytes)
    return round(server / 2**20, 1), round(ray / 2**20, 1)


def processes_of(root_pid: int) -> list[psutil.Process]:
    """A process and all below it; none when it is gone."""
    try:
        root = psutil.Process(root_pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
