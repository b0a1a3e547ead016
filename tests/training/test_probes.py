"""Probes: what they look at, that they learn, that the trained ones read what they claim."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.errors import BadWeights
from training import probes
from training.draw import draw_data
from training.identity import sample_identity
from training.layout import BadData, truth_path
from training.measures import correlation
from training.motion import Motion, sample_motion, to_array
from training.probes import READINGS, Probe, augmented, crops, load_probes, oval, read_samples, readings_of
from training.world import render

FILE = probes.BUNDLED.name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five people, three frames each."""
    folder = tmp_path_factory.mktemp("poses")
    draw_data(folder, "poses", range(40, 45), 3, 96, 1)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_readings_are_the_motions_own_values():
    motion = Motion(pitch=1, yaw=2, roll=3, gaze_x=0.1, gaze_y=0.2, blink_left=0.4, blink_right=0.8, jaw=0.5, smile=0.7)
    read = dict(zip(READINGS, readings_of(to_array(motion)[None])[0].tolist(), strict=True))
    assert read["yaw"] == 2 and read["pitch"] == 1 and read["roll"] == 3
    assert [read[k] for k in ("gaze_x", "gaze_y", "blink", "jaw", "smile")] == pytest.approx([0.1, 0.2, 0.6, 0.5, 0.7])


def test_a_crop_follows_the_head_and_nothing_else():
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[118:138, 150:170] = 255  # around (160, 128): x = 0.25, and the middle is a twentieth of the scale lower
    motion = Motion(x=0.25, y=-0.03, scale=0.6)
    turned = dataclasses.replace(motion, yaw=30, pitch=-12, roll=9, jaw=1, gaze_x=1)
    found = crops(np.stack([picture, picture]), np.stack([to_array(motion), to_array(turned)]))
    assert torch.equal(found[0], found[1])
    assert found.shape == (2, 3, probes.CROP_PX, probes.CROP_PX)
    rows, columns = torch.nonzero(found[0, 0] > 0, as_tuple=True)
    middle = (probes.CROP_PX - 1) / 2
    assert abs(float(rows.float().mean()) - middle) < 0.6 and abs(float(columns.float().mean()) - middle) < 0.6


def test_crops_of_a_larger_picture_show_the_same():
    motion = Motion(yaw=12, scale=0.6)
    large, small = (render(sample_identity(7), motion, size) for size in (512, 256))
    found = [crops(picture[None], to_array(motion)[None]) for picture in (large, small)]
    assert (found[0] - found[1]).abs().mean() < 0.02


def test_the_oval_hides_the_corners_and_keeps_the_face():
    masked = oval(torch.ones(1, 3, 40, 40))
    assert masked[0, :, 0, 0].tolist() == [0, 0, 0]
    assert masked[0, :, 20, 20].tolist() == [1, 1, 1]


def test_augmentation_repeats_for_a_seed_and_stays_in_range():
    wide = np.random.default_rng(0).integers(0, 256, (6, 140, 140, 3)).astype(np.uint8)
    first, again, other = (augmented(wide, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (6, 3, probes.CROP_PX, probes.CROP_PX)
    assert first.abs().max() <= 1


def test_samples_are_all_frames_with_their_persons_numbered_anew_in_parts(data: Path):
    samples = read_samples(data)
    assert samples.crops.shape == (15, 140, 140, 3)
    assert samples.persons.tolist() == np.repeat(np.arange(5), 3).tolist()
    part = samples.part(3, 5)
    assert part.persons.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(part.readings, samples.readings[9:])


def test_filmed_clips_are_refused(tmp_path: Path):
    draw_data(tmp_path, "poses", range(2), 2, 64, 1)
    truth_path(tmp_path, "poses-0000001").unlink()
    with pytest.raises(BadData, match="poses-0000001"):
        read_samples(tmp_path)


def test_the_command_writes_probes_that_load_with_their_scores(data: Path, tmp_path: Path, monkeypatch, capsys):
    options = ["--minutes", "0.02", "--data", str(data), "--hold-out", "2", "--threads", "1", "--batch", "3"]
    monkeypatch.setattr(sys, "argv", ["probes", str(tmp_path), *options])
    probes.main()
    assert "steps" in capsys.readouterr().out
    loaded = load_probes(tmp_path / FILE)
    assert {"r2_yaw", "r2_gaze_y", "identity_accuracy"} <= loaded.scores.keys()
    assert (tmp_path / FILE).stat().st_size < 3e6


def test_probes_that_are_trained_further_begin_as_they_were(data: Path, tmp_path: Path, monkeypatch):
    options = ["--steps", "1", "--data", str(data), "--hold-out", "2", "--threads", "1", "--batch", "3"]
    monkeypatch.setattr(sys, "argv", ["probes", str(tmp_path), *options, "--start", str(probes.BUNDLED)])
    probes.main()
    files = probes.BUNDLED, tmp_path / FILE
    before, after = (next(load_probes(file).network.parameters()) for file in files)
    assert 0 < (before - after).abs().max() < 1e-3


def test_a_missing_file_is_refused_with_the_command_that_writes_it(tmp_path: Path):
    with pytest.raises(BadWeights, match=r"training\.probes"):
        load_probes(tmp_path / FILE)


def test_a_probe_of_another_shape_is_refused(tmp_path: Path):
    probes.save_probe(Probe(num_readings=3), tmp_path / FILE, {}, 1)
    with pytest.raises(BadWeights, match="world"):
        load_probes(tmp_path / FILE)


def test_the_bundled_probes_read_people_they_have_never_seen_and_better_in_several_views():
    rng = np.random.default_rng(3)
    motions = [sample_motion(rng) for _ in range(40)]
    pictures = np.stack([render(sample_identity(1_500_000 + i), m, 256) for i, m in enumerate(motions)])
    arrays = np.stack([to_array(motion) for motion in motions])
    bundled, true = load_probes(), readings_of(arrays)
    read = bundled.look(pictures, arrays)[0]
    for name in ("yaw", "pitch", "roll", "jaw", "blink"):
        column = READINGS.index(name)
        assert correlation(true[:, column], read[:, column]) > 0.9, name
    at_a_glance = bundled.network(crops(pictures, arrays))[0].numpy() * np.array(probes.SPREADS)
    promised = [READINGS.index(name) for name in ("yaw", "pitch", "roll", "jaw", "blink", "gaze_x", "gaze_y")]
    in_views, plain = (np.square(each - true)[:, promised].mean(0) for each in (read, at_a_glance))
    assert (in_views < plain).all()


def test_the_bundled_identity_probe_tells_people_apart_whatever_they_do():
    rng = np.random.default_rng(4)
    people = np.repeat([1_600_000, 1_600_001, 1_600_002, 1_600_003], 3)
    motions = [sample_motion(rng) for _ in people]
    pictures = np.stack([render(sample_identity(int(p)), m, 256) for p, m in zip(people, motions, strict=True)])
    embedded = load_probes().look(pictures, np.stack([to_array(motion) for motion in motions]))[1]
    assert np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    cosines = embedded @ embedded.T
    is_same = people[:, None] == people[None]
    assert cosines[is_same].mean() > cosines[~is_same].mean() + 0.4
