import os

import pytest

from stages.threads import default_num_threads


@pytest.mark.parametrize(("processors", "threads"), [(1, 1), (2, 1), (3, 1), (5, 1), (6, 2), (16, 5)])
def test_a_third_of_the_processors_but_at_least_one(monkeypatch, processors, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    assert default_num_threads() == threads


def test_only_processors_that_this_process_may_use_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 11, 12, 13, 14, 15, 16, 40})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert default_num_threads() == 3
