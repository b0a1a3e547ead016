"""The command on the smoke recipe with a step or two for each phase, and what it says of differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.config import ModelConfig, load_config
from stages.weights import save_folder
from training.ablations import main
from training.draw import Plan, draw_clip
from training.layout import Manifest, write_manifest
from training.paper import COLUMNS

SHORT = (
    "--set",
    "distill.face_weight=2.5",
    "--distill-steps",
    "2",
    "--stream-steps",
    "1",
    "--identities",
    "2",
    "--seconds",
    "0.3",
    "--threads",
    "1",
)


@pytest.fixture(scope="module")
def weights(config: ModelConfig, face_finders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    save_folder(path, config, {name: network.state_dict() for name, network in face_finders(0).items()})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people of 64x64 who talk for fourteen frames."""
    folder = tmp_path_factory.mktemp("data")
    clips = tuple(draw_clip(Plan(folder, "talk", seed, 14, 64)) for seed in range(2))
    write_manifest(Manifest(folder, 64, 25.0, clips))
    return folder


@pytest.fixture(scope="module")
def command(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """command(*more): the exit code; all calls work on one OUT."""
    out = tmp_path_factory.mktemp("out")

    def run(*more: str) -> int:
        given = ("--weights", str(weights), "--data", str(data), "--out", str(out), "--recipe", "smoke")
        return main([*given, *SHORT, *more])

    run.out = out  # type: ignore[attr-defined]
    return run


def test_variants_are_trained_from_shared_phases_and_compared_with_full(command, capsys):
    assert command("--only", "without-gan", "half-chunk", "without-keyframes", "threshold-20", "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert "distill.face_weight=2.5" in printed.err and "distill 2 steps, stream 1 steps (2 updates" in printed.err
    assert json.loads((command.out / "full/distill/finished.json").read_text())["config"]["face_weight"] == 2.5
    assert list(report["variants"]) == ["full", "without-gan", "without-keyframes", "half-chunk", "threshold-20"]
    trained = {str(path.parent.relative_to(command.out)) for path in command.out.glob("*/*/finished.json")}
    assert trained == {"full/distill", "full/stream", "without-gan/distill", "without-gan/stream", "half-chunk/stream"}
    assert json.loads((command.out / "ablations.json").read_text()) == report
    assert load_config(command.out / "half-chunk/stream/weights").window.chunk_frames == 1
    for row in report["variants"].values():
        assert set(COLUMNS) <= set(row["means"]) and row["means"]["psnr_db"] > 0
    assert report["variants"]["full"]["differences"] == {}
    assert set(report["variants"]["without-gan"]["differences"]) == {"sharpness"}
    assert set(report["variants"]["half-chunk"]["differences"]) == {"identity", "aed", "apd", "tlp"}
    table = (command.out / "ablations.md").read_text()
    assert "| half-chunk |" in table and "| 0.66 | 0.713 | 0.031 | 520.2 | 12.14 |" in table


def test_the_same_command_again_does_nothing_again(command, capsys):
    assert command("--only", "without-keyframes") == 0
    before = {path: path.stat().st_mtime_ns for path in command.out.glob("*/evaluation.json")}
    steps = {path: path.read_bytes() for path in command.out.glob("*/*/metrics.jsonl")}
    assert command("--only", "without-keyframes") == 0
    assert "full" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in command.out.glob("*/evaluation.json")}
    assert steps == {path: path.read_bytes() for path in command.out.glob("*/*/metrics.jsonl")}


def test_the_distillation_table_has_few_and_many_steps_before_and_after(command, capsys):
    assert command("--distillation-table") == 0
    printed = capsys.readouterr().out
    report = json.loads((command.out / "distillation.json").read_text())
    rows = [(row["weights"], row["num_steps"]) for row in report["rows"]]
    assert rows[2:] == [("before", 1), ("before", 3), ("before", 20), ("after", 1), ("after", 3)]
    assert "| portrait | – |" in printed and "| autoencoder | – |" in printed
    assert (command.out / "distillation.md").read_text() == printed


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--only", "without-hands"], "without-hands"),
        (["--identities", "0"], "--identities"),
        (["--stream-steps", "0"], "--stream-steps"),
        (["--recipe", "huge"], "official, tiny, smoke"),
        (["--set", "distill.size=3"], "no field 'distill.size'"),
        (["--set", "distill.num_steps"], "FIELD=VALUE"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(command, capsys, more: list[str], named: str):
    assert command(*more) == 2
    assert named in capsys.readouterr().err


def test_weights_that_lack_a_network_are_refused(data: Path, tmp_path: Path, capsys):
    given = ["--weights", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "out"), "--recipe", "smoke"]
    assert main(given) == 2
    assert "lacks vae, image_encoder" in capsys.readouterr().err
