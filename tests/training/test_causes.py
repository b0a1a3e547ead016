"""Where an error is from: what is found and what is known of the same trial."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stages.config import ModelConfig
from stages.pipeline import Stages, load_stages
from stages.weights import save_folder
from training.answers import tailed_motions
from training.causes import Drive, chunks_of, found, known, main, moved
from training.trials import draw_trial, make_cast, project_all


@pytest.fixture(scope="module")
def weights(config: ModelConfig, face_finders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_folder(folder, config, {name: network.state_dict() for name, network in face_finders(1).items()})
    return folder


@pytest.fixture(scope="module")
def stages(weights: Path) -> Stages:
    return load_stages(str(weights), device="cpu", num_threads=1)


def test_what_is_known_is_the_portraits_own_motion_and_that_of_its_answer(stages: Stages):
    cast = make_cast(0, 0, 4)
    drive = known(stages, cast, 6)
    points = project_all(cast.person, (cast.rest, *cast.shown))
    np.testing.assert_allclose(drive.own_keypoints, points[0], atol=1e-6)
    np.testing.assert_allclose(drive.keypoints[:4], points[1:], atol=1e-6)
    assert np.array_equal(drive.keypoints[4], drive.keypoints[5])
    assert np.array_equal(drive.tokens[3], drive.tokens[5]) and not np.array_equal(drive.tokens[0], drive.tokens[3])


def test_a_drive_is_sent_as_the_motion_stage_sends_it(stages: Stages):
    trial = draw_trial(make_cast(0, 0, 4), stages.config)
    opened = stages.motion.open(trial.portrait)
    sent = tailed_motions(stages, opened, trial.driving)
    ours = list(chunks_of(stages, found(stages, opened, sent)))
    assert [chunk.tokens.shape for chunk in ours] == [chunk.tokens.shape for chunk in sent]
    behind = stages.config.window.num_transition_frames
    np.testing.assert_array_equal(ours[0].keypoints[behind:], sent[0].keypoints[behind:])
    np.testing.assert_array_equal(ours[0].keypoints[0], sent[0].keypoints[0])
    np.testing.assert_array_equal(ours[1].tokens, sent[1].tokens)


def test_a_portrait_that_is_moved_to_where_it_is_stays(stages: Stages):
    cast = make_cast(0, 0, 2)
    trial, drive = draw_trial(cast, stages.config), known(stages, cast, 2)
    rest = Drive(drive.own_keypoints, drive.own_keypoints[None], drive.own_tokens, drive.own_tokens[None])
    [still], other = moved(stages, trial.portrait, rest, 1), moved(stages, trial.portrait, drive, 2)
    assert other.shape == (2, *trial.portrait.shape)
    assert np.abs(still.astype(int) - trial.portrait).mean() < 8 < np.abs(other[1].astype(int) - still).max()


def test_the_command_tells_found_from_true(weights: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--weights", str(weights), "--identities", "1", "--seconds", "0.1", "--threads", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    parts = [f"{a} keypoints, {b} expressions" for a in ("found", "true") for b in ("found", "true")]
    names = {"portrait, unmoved"} | {f"{who}, {part}" for who in ("moved", "model") for part in parts}
    assert set(rows) == names
    moved_rows = [rows[f"moved, {part}"]["psnr_db"] for part in (parts[0], parts[3])]
    assert moved_rows[0] != moved_rows[1] and all(0 < row["psnr_face_db"] < 60 for row in rows.values())


def test_senseless_numbers_are_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["--identities", "0"]) == 2
    assert "--identities" in capsys.readouterr().err
