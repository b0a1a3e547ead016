"""What holds for every test."""

import os
import sys

import pytest

NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", 0))


@pytest.fixture(autouse=True)
def threads_as_they_were():
    """Commands that are tested in this process choose torch's threads. The tests after them shall not have more than
    `make test` gives to each of its processes, or all of them wait for each other."""
    yield
    if NUM_THREADS and (torch := sys.modules.get("torch")):
        torch.set_num_threads(NUM_THREADS)
