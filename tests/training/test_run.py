"""The command, in this process and without Ray."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from stages.errors import BadWeights
from stages.weights import load_tensors
from training.curves import read_metrics
from training.draw import Plan, draw_clip
from training.layout import Manifest, read_manifest, write_manifest
from training.phases.build import make_critic
from training.recipes import smoke
from training.run import main

SHORT = ["--set", "autoencoder.batch_size=1", "--set", "autoencoder.log_every=1", "--threads-per-worker", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three people of 64x64, nine frames each."""
    folder = tmp_path_factory.mktemp("data")
    clips = tuple(draw_clip(Plan(folder, "poses", seed, 9, 64)) for seed in range(3))
    write_manifest(Manifest(folder, 64, 25.0, clips))
    return folder


def command(data, out, *more, phases=("autoencoder",), recipe="smoke"):
    return main([*phases, "--recipe", recipe, "--data", str(data), "--out", str(out), "--local", *SHORT, *more])


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    assert command(data, folder, "--steps", "2") == 0
    return folder


def test_a_phase_leaves_recipe_metrics_curves_checkpoints_and_weights(out):
    place = out / "autoencoder"
    assert json.loads((place / "recipe.json").read_text())["autoencoder"]["num_steps"] == 2
    assert [metrics["step"] for metrics in read_metrics(place)] == [1, 2]
    assert list((place / "curves").glob("events.*"))
    assert (place / "checkpoints/step-00000002/state.json").exists()
    assert {path.name for path in (place / "weights").iterdir()} == {"config.json", "vae.safetensors"}


def test_the_whole_recipe_is_printed(data, tmp_path, capsys):
    command(data, tmp_path, "--steps", "1", "--seed", "4")
    printed = json.loads(capsys.readouterr().out)
    assert printed["seed"] == 4 and printed["stream"]["sampling"]["kind"] == "run"


def test_the_same_command_again_finds_the_phase_finished(data, out, capsys):
    assert command(data, out, "--steps", "2") == 0
    assert "phase autoencoder is finished" in capsys.readouterr().out


def test_more_steps_go_on_from_the_last_checkpoint(data, tmp_path):
    assert command(data, tmp_path, "--steps", "1") == 0
    assert command(data, tmp_path, "--steps", "3") == 0
    assert [metrics["step"] for metrics in read_metrics(tmp_path / "autoencoder")] == [1, 2, 3]
    assert (tmp_path / "autoencoder/checkpoints/step-00000003").exists()


def test_the_next_phase_starts_from_the_weights_of_the_one_before(data, tmp_path):
    assert command(data, tmp_path, "--steps", "1", phases=("autoencoder", "keypoints")) == 0
    before, after = tmp_path / "autoencoder/weights", tmp_path / "keypoints/weights"
    assert (after / "vae.safetensors").read_bytes() == (before / "vae.safetensors").read_bytes()
    assert (after / "motion_encoder.safetensors").exists()
    scales = [json.loads((weights / "config.json").read_text())["vae"] for weights in (before, after)]
    assert scales[0] == scales[1]


def test_phases_may_have_data_of_their_own(data, tmp_path, capsys):
    arguments = ["autoencoder", "--recipe", "smoke", "--out", str(tmp_path), "--local", "--steps", "1", *SHORT]
    assert main([*arguments, "--data", "nowhere", "--data", f"autoencoder={data}"]) == 0
    assert main([*arguments, "--data", f"stream={data}"]) == 1
    assert "phase autoencoder has no data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seed", "3"], "bad_resume: .*seed was 0 and is 3"),
        (["--steps", "1"], "bad_resume: .*config.num_steps was 2 and is 1"),
        (["--set", "autoencoder.batch=1"], "bad_config: .*no field 'autoencoder.batch'"),
        (["--set", "autoencoder.batch_size=many"], "bad_config: .*expected int"),
        (["--set", "autoencoder.batch_size=0"], "bad_config: .*batch_size 0 must be at least 1"),
        (["--set", "autoencoder"], "bad_config: .*FIELD=VALUE"),
        (["--weights", "."], "bad_config: .*not a weights folder"),
        (["--workers", "2"], "bad_config: .*--local"),
        (["--data", "nowhere"], "bad_data: .*nowhere"),
        (["--set", "model.size_px=128"], "bad_data: .*64 px.*128 px"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(data, out, capsys, more, named):
    assert command(data, out, "--steps", "2", *more) == 1
    assert re.search(named, capsys.readouterr().err)


def test_a_run_does_not_go_on_with_other_data(data, tmp_path, capsys):
    clips = read_manifest(data).clips
    grown = tmp_path / "data"
    shutil.copytree(data, grown)
    assert command(grown, tmp_path, "--steps", "1") == 0
    write_manifest(Manifest(grown, 64, 25.0, clips[:-1]))
    assert command(grown, tmp_path, "--steps", "2") == 1
    assert re.search("bad_resume: .*data was", capsys.readouterr().err)


def test_the_discriminator_goes_on_where_the_phase_before_left_it(data, tmp_path):
    short = ["--set", "distill.batch_size=1", "--set", "distill.critic_from_step=0"]
    assert command(data, tmp_path, "--steps", "1", *short, phases=("distill",)) == 0
    left = tmp_path / "distill/weights"
    learned = load_tensors(left / "critic.safetensors")
    recipe = smoke()
    again = make_critic(recipe.stream, recipe.model, recipe.seed, left).state_dict()
    drawn = make_critic(recipe.stream, recipe.model, recipe.seed, None).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in learned.items())
    assert not all(torch.equal(drawn[name], tensor) for name, tensor in learned.items())
    with pytest.raises(BadWeights, match="critic_channels 16"):
        make_critic(replace(recipe.stream, critic_channels=16), recipe.model, recipe.seed, left)


def test_an_unknown_recipe_is_refused_by_those_there_are(data, tmp_path, capsys):
    assert command(data, tmp_path, recipe="huge") == 1
    assert "official, tiny, smoke" in capsys.readouterr().err


def test_a_recipe_that_starts_from_weights_does_not_start_from_nothing(data, tmp_path, capsys):
    assert command(data, tmp_path, "--set", "model.size_px=64", phases=("motion",), recipe="official") == 1
    assert "bad_weights" in capsys.readouterr().err
