"""Checkpoints on a real disk: whole or not there, also where the disk has no room and where files are broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.checkpoints import (
    BadResume,
    Checkpoint,
    CheckpointFailed,
    State,
    check_same,
    load_checkpoint,
    made_with,
    newest_checkpoint,
    newest_state,
    save_checkpoint,
    step_folder,
)

RUN = {"phase": "motion", "seed": 3, "config": {"num_steps": 9, "checkpoint_every": 2, "optimiser": {"betas": [0.9]}}}
ROOT = Path(__file__).parents[2]
ON_A_SMALL_DISK = """
import resource, sys
from pathlib import Path
from training.checkpoints import CheckpointFailed
from tests.training import test_checkpoints as here

folder = Path(sys.argv[1])
here.save_checkpoint(folder, here.checkpoint(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    here.save_checkpoint(folder, here.checkpoint(2))
except CheckpointFailed as error:
    print(error)
"""


def checkpoint(step):
    """Tensors of two groups, about 4 kB."""
    weights = {"conv.weight": torch.full((5, 3, 7), float(step)), "big": torch.arange(900.0) + step}
    optimiser = {"conv.weight|step": torch.tensor(float(step)), "conv.weight|exp_avg": torch.ones(5, 3, 7)}
    return Checkpoint(State(step, 2, RUN, made_with(1)), {"weights": weights, "optimiser": optimiser, "average": {}})


def test_what_is_loaded_is_what_was_saved(tmp_path):
    save_checkpoint(tmp_path, checkpoint(4))
    found = newest_checkpoint(tmp_path)
    assert found.state == checkpoint(4).state
    for name, tensors in checkpoint(4).groups.items():
        assert found.groups[name].keys() == tensors.keys()
        assert all(torch.equal(found.groups[name][key], tensor) for key, tensor in tensors.items())


def test_an_empty_place_has_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_state(tmp_path) is None


def test_the_newest_two_are_kept_and_nothing_hidden_stays(tmp_path):
    (tmp_path / ".step-00000001-77.part").mkdir()
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, checkpoint(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, checkpoint(2))
    (step_folder(tmp_path, 2) / "weights.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, checkpoint(2))
    assert newest_checkpoint(tmp_path).state.step == 2


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json"])
def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before_with_a_warning(tmp_path, caplog, file):
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint(step))
    path = step_folder(tmp_path, 4) / file
    path.write_bytes(path.read_bytes()[:-9])
    assert newest_checkpoint(tmp_path).state.step == 2
    assert "step-00000004 is broken" in caplog.text


def test_a_broken_checkpoint_that_is_asked_for_is_named(tmp_path):
    save_checkpoint(tmp_path, checkpoint(2))
    (step_folder(tmp_path, 2) / "state.json").write_text("[]")
    with pytest.raises(BadResume, match="step-00000002 is broken"):
        load_checkpoint(step_folder(tmp_path, 2))


def test_a_full_disk_leaves_the_one_before_whole_and_says_the_sizes(tmp_path):
    command = [sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "step-00000002 of 0.0 MB cannot be written" in done.stdout
    assert "step-00000001" in done.stdout and "stay whole" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_checkpoint(tmp_path).state.step == 1


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    huge = torch.empty((), dtype=torch.float32).expand(1 << 40, 1 << 10)
    with pytest.raises(CheckpointFailed, match=r"MB are free.*none before it"):
        save_checkpoint(tmp_path, Checkpoint(State(1, 0, RUN, {}), {"weights": {"huge": huge}}))
    assert not list(tmp_path.iterdir())


def test_the_same_run_may_go_on_with_more_steps_and_other_habits():
    more = json.loads(json.dumps(RUN))
    more["config"] |= {"num_steps": 20, "checkpoint_every": 5}
    check_same(RUN, more, Path("place"), {})


def test_a_field_that_is_newer_than_the_checkpoint_counts_as_having_been_at_its_default():
    newer, defaults = RUN | {"model": {"size_px": 64, "causal": 0}}, {"model": {"size_px": 512, "causal": 0}}
    check_same(RUN | {"model": {"size_px": 64}}, newer, Path("place"), defaults)
    with pytest.raises(BadResume, match=r"model.causal was 0 and is 1"):
        check_same(RUN, newer | {"model": {"size_px": 512, "causal": 1}}, Path("place"), defaults)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"config": RUN["config"] | {"num_steps": 8}}, "config.num_steps was 9 and is 8"),
        ({"config": RUN["config"] | {"optimiser": {"betas": [0.8]}}}, r"config.optimiser.betas was \[0.9\]"),
        ({"extra": 1}, "extra was None and is 1"),
    ],
)
def test_another_run_is_refused_by_the_names_of_what_differs(change, named):
    with pytest.raises(BadResume, match=named):
        check_same(RUN, RUN | change, Path("place"), {})
