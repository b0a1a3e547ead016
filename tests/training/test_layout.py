"""A data folder is read as it was written, and says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.layout import (
    BadData,
    Boxes,
    Clip,
    Manifest,
    Truth,
    boxes_path,
    read_boxes,
    read_manifest,
    read_truth,
    truth_path,
    write_boxes,
    write_manifest,
    write_truth,
)


def test_a_manifest_comes_back_with_its_clips_in_the_order_of_their_names(tmp_path: Path):
    written = Manifest(tmp_path, 64, 25.0, (Clip("b", 7, "b.mov"), Clip("a", 5)))
    write_manifest(written)
    assert read_manifest(tmp_path) == Manifest(tmp_path, 64, 25.0, (Clip("a", 5), Clip("b", 7, "b.mov")))


def test_a_folder_without_a_manifest_names_the_commands_that_write_one(tmp_path: Path):
    with pytest.raises(BadData, match=r"training\.draw"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"size_px": 64}', '{"size_px": 64, "fps": 25, "clips": [{"x": 1}]}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadData, match="is not a manifest"):
        read_manifest(tmp_path)


def test_a_manifest_without_clips_is_refused(tmp_path: Path):
    write_manifest(Manifest(tmp_path, 64, 25.0, ()))
    with pytest.raises(BadData, match="lists no clips"):
        read_manifest(tmp_path)


def test_boxes_and_truth_come_back(tmp_path: Path):
    rng = np.random.default_rng(0)
    boxes = Boxes(*(rng.integers(0, 64, (3, 4)).astype(np.int32) for _ in range(4)))
    truth = Truth(rng.random((3, 14), np.float32), rng.random((21, 3), np.float32), 17)
    write_boxes(tmp_path, "one", boxes)
    write_truth(tmp_path, "one", truth)
    found = read_truth(tmp_path, "one")
    assert np.array_equal(read_boxes(tmp_path, "one").mouth, boxes.mouth)
    assert found is not None and np.array_equal(found.motions, truth.motions)
    assert found.person == 17


def test_truth_that_does_not_name_its_person_is_still_read(tmp_path: Path):
    write_truth(tmp_path, "one", Truth(np.zeros((3, 14), np.float32), np.zeros((21, 3), np.float32), 17))
    with np.load(truth_path(tmp_path, "one")) as stored:
        older = {name: stored[name] for name in ("motions", "canonical")}
    np.savez(truth_path(tmp_path, "one"), **older)
    found = read_truth(tmp_path, "one")
    assert found is not None and found.person == -1


def test_a_filmed_clip_has_no_truth(tmp_path: Path):
    assert read_truth(tmp_path, "filmed") is None


def test_damaged_boxes_and_truth_are_refused_by_their_path(tmp_path: Path):
    for path in (boxes_path(tmp_path, "one"), truth_path(tmp_path, "one")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not an archive")
    with pytest.raises(BadData, match="boxes"):
        read_boxes(tmp_path, "one")
    with pytest.raises(BadData, match="truth"):
        read_truth(tmp_path, "one")


def test_boxes_of_unequal_numbers_are_refused(tmp_path: Path):
    parts = [np.zeros((3 + (index == 2), 4), np.int32) for index in range(4)]
    write_boxes(tmp_path, "one", Boxes(*parts))
    with pytest.raises(BadData, match="as many of each"):
        read_boxes(tmp_path, "one")
