"""Parts that add next to nothing rest, and the model answers as it did without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stages.config import save_config
from stages.networks.layers import Residual
from stages.pipeline import load_stages
from stages.weights import load_tensors, save_folder
from training.thin import candidates, chosen, main, resting


@pytest.fixture
def folder(tmp_path: Path, config, face_finders) -> Path:
    networks = face_finders(5)
    save_folder(tmp_path / "weights", config, {name: network.state_dict() for name, network in networks.items()})
    save_config(config, tmp_path / "weights")
    return tmp_path / "weights"


def test_as_many_rest_as_together_stay_below_the_limit():
    modules = {name: Residual() for name in ("dear", "cheap", "cheaper", "cheapest")}
    costs = dict(zip(map(id, modules.values()), (0.5, 0.04, 0.03, -0.01), strict=True))
    asked = []

    def cost_db(left_out):
        asked.append(len(left_out))
        return sum(costs[id(module)] for module in left_out)

    assert chosen(modules, cost_db, 0.05) == ["cheapest", "cheaper"]
    assert asked == [1, 1, 1, 1, 1, 2, 3]


def test_a_module_rests_only_for_a_while():
    module = Residual()
    with resting([module]):
        assert module.rests
    assert not module.rests


def test_what_shall_work_on_is_no_candidate(folder: Path):
    stages = load_stages(str(folder), device="cpu", num_threads=1)
    every, some = candidates(stages, ()), candidates(stages, ("attentions", "vae"))
    assert any("attentions" in name for name in every) and any(name.startswith("vae.decoder") for name in every)
    assert not any(name.startswith("vae.encoder") for name in every)
    assert some.keys() < every.keys() and not any("attentions" in name or "vae" in name for name in some)


def test_the_command_zeroes_last_layers_and_the_stages_let_them_rest(folder: Path, tmp_path: Path, capsys):
    options = ["--identities", "1", "--seconds", "0.1", "--limit", "99", "--device", "cpu", "--threads", "1"]
    assert main([str(folder), str(tmp_path / "thin"), *options, "--keep", "resnets", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rest"] and report["num_working"] == 0
    before, after = (load_tensors(path / "denoising_unet.safetensors") for path in (folder, tmp_path / "thin"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.split(".")[-2] == "proj_out" and not after[key].any() for key in changed)
    thinned = load_stages(str(tmp_path / "thin"), device="cpu", num_threads=1)
    assert not candidates(thinned, ("resnets",))
    assert (tmp_path / "thin/pose_guider.safetensors").read_bytes() == (folder / "pose_guider.safetensors").read_bytes()


def test_options_without_sense_are_refused_with_a_sentence(folder: Path, tmp_path: Path, capsys):
    assert main([str(folder), str(tmp_path / "thin"), "--identities", "0"]) == 2
    assert "--identities" in capsys.readouterr().err
    assert main([str(folder), str(folder)]) == 2
    assert "another folder" in capsys.readouterr().err
    assert main(["/nowhere", str(tmp_path / "thin")]) == 2
    assert "does not exist" in capsys.readouterr().err
