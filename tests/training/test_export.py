"""Exported weights are complete, half as large, and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.pipeline import load_stages
from stages.weights import NETWORKS, save_folder
from training.export import main
from training.recipes import smoke_model


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = smoke_model()
    save_folder(tmp_path / "trained", model, {name: make(model).state_dict() for name, make in NETWORKS.items()})
    return tmp_path / "trained"


def test_everything_is_stored_in_half_precision(trained: Path):
    assert main([str(trained), str(trained.parent / "out")]) == 0
    kinds = {
        name: {
            t.dtype for t in load_file(trained.parent / "out" / f"{name}.safetensors").values() if t.is_floating_point()
        }
        for name in NETWORKS
    }
    assert all(found == {torch.float16} for found in kinds.values())
    assert load_stages(str(trained.parent / "out"), device="cpu", num_threads=1).config == smoke_model()


def test_an_incomplete_folder_is_refused_by_what_it_lacks(trained: Path, capsys: pytest.CaptureFixture[str]):
    (trained / "vae.safetensors").unlink()
    assert main([str(trained), str(trained.parent / "out")]) == 1
    assert "lacks vae" in capsys.readouterr().err
    assert not (trained.parent / "out").exists()
