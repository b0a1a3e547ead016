import asyncio
import ctypes
import gc
import mmap
import subprocess
import sys
import weakref

import psutil
import pytest

from cluster import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")

SCRIPT = """
import gc, psutil
from cluster.memory import keep_large_buffers_apart
PREPARE
import threading
def work():
    # What a flood leaves: large buffers of many sizes, freed in a thread other than the first.
    for _ in range(5):
        buffers = [bytearray(1_500_000 + 50_000 * k) for k in range(40)]
        del buffers
before = psutil.Process().memory_info().rss
thread = threading.Thread(target=work)
thread.start()
thread.join()
gc.collect()
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


def test_large_buffers_leave_nothing_behind():
    code = SCRIPT.replace("PREPARE", "keep_large_buffers_apart()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5


@pytest.fixture
def only_asked_collection():
    """Python does not look for cycles by itself meanwhile."""
    gc.disable()
    yield
    gc.enable()


class Cycle:
    def __init__(self):
        self.me = self


@pytest.mark.usefixtures("only_asked_collection")
async def test_cycles_are_collected_soon_after_somebody_asked():
    gone = weakref.ref(Cycle())
    memory.Releaser(0.01).soon()
    await asyncio.sleep(0.1)
    assert gone() is None


@pytest.mark.usefixtures("only_asked_collection")
async def test_nothing_is_released_in_the_middle_of_work():
    releaser, kept = memory.Releaser(0.2), weakref.ref(Cycle())
    for _ in range(5):
        releaser.when_idle()
        await asyncio.sleep(0.05)
    assert kept() is not None
    await asyncio.sleep(0.4)
    assert kept() is None


def test_freed_small_buffers_go_back_to_the_system():
    # A list of small buffers with a survivor at its end keeps the heap tall: only trimming frees the pages below it.
    buffers = [bytes(60_000) for _ in range(2000)]
    survivor = bytes(60_000)
    del buffers
    before = psutil.Process().memory_info().rss
    memory.release()
    assert psutil.Process().memory_info().rss < before - 50 * 2**20
    assert not any(survivor)


def resident_kib(address):
    """Resident KiB of the mapping that holds an address."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                inside = start <= address < end
            elif inside and first == "Rss:":
                return int(line.split()[1])
    raise AssertionError("no such mapping")


def test_pages_of_the_object_store_leave_the_process_and_keep_their_contents(tmp_path):
    path = tmp_path / "plasma-of-this-test"
    path.write_bytes(b"\0" * 2**22)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 2**22) as shared:
        shared[:] = b"x" * 2**22
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        assert resident_kib(address) >= 4000
        memory.release()
        assert resident_kib(address) < 100
        assert shared[2**21] == ord("x")
