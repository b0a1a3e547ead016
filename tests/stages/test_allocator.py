"""Whether memory that is freed and asked for again costs the system anything, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")

SCRIPT = """
import resource, threading
from stages.allocator import keep_freed_memory
PREPARE
def work():
    # As layers do, in a thread other than the first; by default this costs 90000 faults.
    for _ in range(20):
        buffers = [b"x" * (size * 2**20) for size in (3, 6, 6, 6, 6)]
        del buffers
def num_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=lambda: (work(), before.append(num_faults()), work()))
before = []
thread.start()
thread.join()
print(num_faults() - before[0])
"""


def num_faults(prepare: str) -> int:
    code = SCRIPT.replace("PREPARE", prepare)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    return int(done.stdout)


def test_freed_memory_is_used_again_without_asking_the_system():
    # Once through these buffers are 7000 pages.
    assert num_faults("keep_freed_memory()") < 700
