import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.messages import CleanChunk, MotionChunk, MotionState, Pose, WindowSnapshot

POSE = Pose(*(np.ones(shape, np.float32) for shape in ((1, 9, 3), (1, 3), (1, 3), (1, 1))))


def test_messages_and_their_torch_free_neighbours_leave_torch_unloaded():
    names = ("chunks", "config", "errors", "messages", "portraits", "threads", "video")
    imports = "; ".join(f"import stages.{name}" for name in names)
    code = f"import sys; {imports}; print({{'torch', 'ray'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout == "set()\n", run.stderr


def test_a_motion_state_survives_a_process_border_bit_by_bit():
    seen = {
        "fields": np.float16([[[[0.1, 65504]]]]),
        "depths": np.float16([[[-0.3]], [[9.0]]]),
        "light": np.float16([[[0.7, -0.0]]]),
        "apart": np.float16([[[[0.2]]], [[[-0.0]]]]),
    }
    state = MotionState(POSE, np.float32([[0.1, -0.0, np.inf]]), True, POSE, **seen)
    arrived = pickle.loads(pickle.dumps(state))
    assert all(getattr(arrived, name).tobytes() == part.tobytes() for name, part in seen.items())
    assert arrived.portrait_tokens.tobytes() == state.portrait_tokens.tobytes()
    assert arrived.first.canonical.tobytes() == POSE.canonical.tobytes()
    assert (arrived.started, arrived.held, arrived.last_tokens) == (True, None, None)


def test_a_snapshot_survives_a_process_border_with_and_without_the_portraits_keypoints():
    empty = np.zeros(0, np.float32)
    for keypoints in (None, np.float32([[0.1, -0.0, 2.5]])):
        snapshot = WindowSnapshot(7, 0, empty, empty, empty, empty, (), keypoints)
        arrived = pickle.loads(pickle.dumps(snapshot))
        assert np.array_equal(arrived.portrait_keypoints, keypoints)


def test_a_new_motion_state_has_sent_and_seen_nothing():
    state = MotionState(POSE, np.zeros((5, 6), np.float32))
    assert (state.started, state.first, state.held, state.last_tokens) == (False, None, None, None)


@pytest.mark.parametrize(
    ("message", "field"),
    [(POSE, "scale"), (CleanChunk(np.zeros(1, np.float32)), "latents"), (MotionChunk(None, None, ()), "no_face")],
)
def test_messages_are_frozen(message, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(message, field, None)
