"""Evaluation: every promised key, perfect and useless answers told apart, files to look at, clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from stages.config import ModelConfig
from stages.messages import Pixels
from stages.pipeline import load_stages
from stages.video import read_video
from stages.weights import save_folder
from training import evaluate as module
from training.evaluate import (
    Instruments,
    Options,
    drift,
    load_instruments,
    main,
    outcome,
    rounded,
    sheet,
    summary,
    table,
)
from training.trials import Trial, impostors, trials, warped

NUM_FRAMES = 12
PROMISED = (
    "psnr_db",
    "psnr_face_db",
    "psnr_static_db",
    "psnr_static_face_db",
    "psnr_warp_db",
    "psnr_warp_face_db",
    "psnr_ceiling_db",
    "psnr_ceiling_face_db",
    "psnr_shuffled_driver_db",
    "psnr_shuffled_driver_face_db",
    "self_l1",
    "self_ssim",
    "self_perceptual",
    "self_tlp",
    "cross_l1",
    "cross_ssim",
    "cross_perceptual",
    "cross_tlp",
    "cross_psnr",
    "probe_r",
    "probe_r_renders",
    "probe_r2_renders",
    "probe_r_within",
    "probe_r_within_renders",
    "identity",
    "identity_impostor",
    "identity_ceiling",
    "sharpness",
    "drift_db",
    "model_fps",
    "seed",
    "identities",
    "seconds",
    "weights",
    "aed",
    "apd",
)


@pytest.fixture(scope="module")
def folder(config: ModelConfig, face_finders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random networks, but a keypoint extractor that finds a face in the middle of everything."""
    path = tmp_path_factory.mktemp("weights")
    save_folder(path, config, {name: network.state_dict() for name, network in face_finders(0).items()})
    return path


@pytest.fixture(scope="module")
def instruments() -> Instruments:
    return load_instruments(Options("", 1, 1, 0))


@pytest.fixture(scope="module")
def drawn(config: ModelConfig) -> list[Trial]:
    """Two trials at a size at which eyes can be read."""
    return list(trials(7, 2, NUM_FRAMES, replace(config, size_px=128)))


@pytest.fixture(scope="module")
def strangers(config: ModelConfig) -> tuple[Pixels, np.ndarray]:
    return impostors(7, 3, replace(config, size_px=128))


def shown_as(trial: Trial, frames: Pixels) -> dict[str, Pixels]:
    """A model that answers with these frames, and an autoencoder without loss."""
    static = np.repeat(trial.portrait[None], len(trial.truth), 0)
    bars = {"static": static, "warp": warped(trial), "ceiling": trial.truth, "shuffled_driver": static}
    return {"cross": frames, "self": frames, **bars}


def measured(instruments: Instruments, drawn: list[Trial], strangers: Any, answers: list[Pixels]) -> dict[str, Any]:
    pairs = zip(drawn, answers, strict=True)
    return summary([outcome(instruments, trial, shown_as(trial, frames), strangers) for trial, frames in pairs])


def test_a_perfect_answer_is_measured_as_perfect(instruments: Instruments, drawn: list[Trial], strangers: Any):
    report = measured(instruments, drawn, strangers, [trial.truth for trial in drawn])
    assert report["psnr_db"] > 100 and report["psnr_face_db"] > 100
    assert report["cross_l1"] == 0 and report["self_ssim"] == pytest.approx(1)
    assert report["cross_perceptual"] == pytest.approx(0, abs=1e-5)
    assert report["sharpness"] == 1 and report["flicker"] == pytest.approx(1)
    assert report["aed"] == report["apd"] == report["cross_tlp"] == 0
    assert report["probe_r"] == report["probe_r_renders"]
    assert report["probe_r"]["yaw"] > 0.9 < report["probe_r_within"]["yaw"]
    assert report["identity"] == report["identity_ceiling"] > report["identity_impostor"] + 0.3


def test_a_bias_for_each_person_does_not_count_within_trials(
    instruments: Instruments, drawn: list[Trial], strangers: Any
):
    outcomes = [outcome(instruments, trial, shown_as(trial, trial.truth), strangers) for trial in drawn]
    biased = [replace(one, output=one.output + 40 * index) for index, one in enumerate(outcomes)]
    plain, shifted = summary(outcomes), summary(biased)
    assert shifted["probe_r"]["jaw"] < plain["probe_r"]["jaw"] - 0.1
    assert shifted["probe_r_within"] == pytest.approx(plain["probe_r_within"], abs=1e-4)
    assert shifted["probe_r_within_renders"] == plain["probe_r_within_renders"]


def test_an_unmoved_portrait_is_measured_as_one(instruments: Instruments, drawn: list[Trial], strangers: Any):
    static = [np.repeat(trial.portrait[None], NUM_FRAMES, 0) for trial in drawn]
    report = measured(instruments, drawn, strangers, static)
    assert report["psnr_db"] == report["psnr_static_db"] < report["psnr_warp_db"] + 3
    assert report["aed"] == report["aed_static"] > 0 and report["apd"] > 1
    assert report["cross_perceptual"] == report["static_perceptual"] > 0.01
    assert report["flicker"] == 0
    assert report["probe_r_within"]["yaw"] < 0.5 < 0.9 < report["probe_r_within_renders"]["yaw"]


def test_another_persons_answer_costs_identity(instruments: Instruments, drawn: list[Trial], strangers: Any):
    report = measured(instruments, drawn, strangers, [trial.driving for trial in drawn])
    assert report["identity"] < report["identity_ceiling"] - 0.3


def test_the_command_prints_every_promised_key_and_writes_what_people_look_at(folder: Path, tmp_path: Path, capsys):
    options = [
        "--identities",
        "2",
        "--seconds",
        "0.3",
        "--seed",
        "4",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--drift-seconds",
        "0",
    ]
    assert main(["--weights", str(folder), *options, "--json", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert set(PROMISED) <= report.keys()
    assert tuple(report["probe_r"]) == ("yaw", "pitch", "roll", "jaw", "blink", "gaze_x", "gaze_y")
    assert (report["seed"], report["identities"], report["drift_db"]) == (4, 2, None)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    assert cv2.imread(str(tmp_path / "sheet.png")).shape == (2 * 3 * 64, 9 * 64, 3)
    frames = [frame.rgb for frame in read_video(tmp_path / "video.mp4")]
    assert frames[0].shape == (64, 4 * 64, 3) and len(frames) == 2 * round(report["seconds"] * 25)
    assert "shuffled driver" in table(report) and "drift not measured" in table(report)


def test_drift_compares_both_ends_of_one_stream(folder: Path, monkeypatch):
    monkeypatch.setattr(module, "DRIFT_S", 0.2)
    stages = load_stages(str(folder), device="cpu", num_threads=1)
    found = drift(stages, Options("", 1, 1, 0, drift_seconds=0.8))
    assert found is not None and abs(found) < 20
    assert drift(stages, Options("", 1, 1, 0, drift_seconds=0.3)) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--identities", "0"], "--identities"),
        (["--drift-seconds", "5"], "--drift-seconds"),
        (["--weights", "/nowhere"], "does not exist"),
    ],
)
def test_options_without_sense_are_refused_with_a_sentence(arguments: list[str], said: str, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_figures_are_rounded_at_any_depth():
    assert rounded({"a": 0.123456789, "b": {"c": 1.0000001}, "d": None, "e": 3}) == {
        "a": 0.12346, "b": {"c": 1.0}, "d": None, "e": 3,
    }  # fmt: skip


def test_the_sheet_has_three_rows_a_trial(drawn: list[Trial]):
    shown = [module.Shown(t.portrait, t.driving, t.truth, t.truth) for t in drawn]
    assert sheet(shown).shape == (2 * 3 * 128, 9 * 128, 3)
