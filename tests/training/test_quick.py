"""The short training, all phases at the smallest sizes, ends in a folder that the stages can load."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.config import ModelConfig
from stages.weights import NETWORKS, load_folder
from training import animation, quick, samples
from training.tiny import calmed


def test_all_phases_lead_to_a_weights_folder(tmp_path: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "SHARD", 1)
    monkeypatch.setattr(animation, "LEVEL_SHARES", (0.2, 0.3, 0.5))
    monkeypatch.setattr(quick, "STILL_FRAMES", 4)
    monkeypatch.setattr(quick, "CLIP_FRAMES", 19)
    monkeypatch.setattr(quick, "tiny_config", lambda scale: config)
    run = quick.Run(tmp_path, minutes=0.02, seed=0, size=config.size_px)
    run.work.mkdir()
    for phase in quick.PHASES.values():
        phase(run)
    quick.export(run)
    loaded, networks = load_folder(tmp_path, list(NETWORKS))
    assert loaded == calmed(config)
    assert set(networks) == set(NETWORKS)
