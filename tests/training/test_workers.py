"""What the workers of a run and its driver tell one another, without a cluster; tests/system has the cluster."""

from __future__ import annotations

import pytest

from stages.errors import UserError
from training.engine import Run
from training.layout import BadData
from training.recipes import smoke
from training.task import Task
from training.workers import TooFewCpus, check_cpus, note, raise_noted, worker


def task(place):
    recipe = smoke()
    run = Run("keypoints", recipe.model, recipe.keypoints, num_workers=2)
    return Task(run, recipe, place / "no-data", place, None, num_threads=1)


def test_an_error_in_a_worker_reaches_the_driver_with_its_code(tmp_path):
    note(tmp_path, BadData("half of the clips are bad"))
    with pytest.raises(UserError, match="half of the clips") as raised:
        raise_noted(tmp_path)
    assert raised.value.code == "bad_data"
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_without_an_error_nothing_is_raised(tmp_path):
    raise_noted(tmp_path)


def test_a_group_that_is_started_after_such_an_error_returns_at_once(tmp_path):
    note(tmp_path, BadData("half of the clips are bad"))
    worker({"task": task(tmp_path), "use_gpus": False})
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_a_cluster_needs_a_processor_for_each_worker_and_one_for_reading():
    check_cpus(3, 2)
    with pytest.raises(TooFewCpus, match=r"has 2 CPUs.*need 3"):
        check_cpus(2, 2)
