"""People are drawn once and read back as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training import samples
from training.samples import draw_people, load_people, prerender


def test_shards_are_read_back_and_not_drawn_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "SHARD", 2)
    prerender(tmp_path, "still", range(30, 34), num_frames=3, size=32)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    prerender(tmp_path, "still", range(30, 34), num_frames=3, size=32)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    people = load_people(tmp_path, "still")
    assert people.seeds.tolist() == [30, 31, 32, 33]
    assert np.array_equal(people.pixels, draw_people([30, 31, 32, 33], "still", 3, 32).pixels)


def test_a_clip_is_portrait_transition_and_driving_frames():
    people = draw_people([5], "clip", 17, 32)
    assert people.pixels.shape == (1, 17, 32, 32, 3)
    assert np.abs(people.pixels[0, 0].astype(int) - people.pixels[0, 1]).max() <= 1
