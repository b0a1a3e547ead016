"""Goldens of the authors' program, and the synthetic weights that made them.

The set is the folder named by PARITY_SET, or else the few tensors in `subset/`. Nothing here knows any set's sizes.
`@pytest.mark.golden(file, key, ...)` says what a test needs. A given set is tested on the files it has, the others are
deselected; on the subset they are skipped, so that a plain run says what it leaves out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from stages.config import ImageEncoderConfig, ModelConfig, PoseGuiderConfig, UNetConfig, VaeConfig

SUBSET = Path(__file__).parent / "subset"
SET_DIR = Path(os.environ.get("PARITY_SET") or SUBSET).resolve()

Golden = Callable[[str], dict[str, Tensor]]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(file, *keys): a golden file that the test needs, and tensors in it")
    if not (SET_DIR / "mini_config.json").is_file():
        raise pytest.UsageError(f"PARITY_SET={SET_DIR} is not a parity set: it has no mini_config.json")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = [item for item in items if item.path.parent == Path(__file__).parent and _missing(item)]
    if SET_DIR == SUBSET:
        for item in absent:
            item.add_marker(pytest.mark.skip(f"the committed subset lacks {_missing(item)}: set PARITY_SET"))
    elif absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def _missing(item: pytest.Item) -> str:
    """What the set lacks of the item's golden marks; empty when it has everything."""
    needs = [(str(mark.args[0]), set(mark.args[1:])) for mark in item.iter_markers("golden")]
    absent = {name: keys - _golden_keys(name) for name, keys in needs}
    parts = [" ".join([name, *sorted(keys)]) for name, keys in absent.items() if keys or not _golden_keys(name)]
    return ", ".join(parts)


@functools.cache
def _golden_keys(name: str) -> set[str]:
    """The tensors of a golden file; none when the set has no such file."""
    path = SET_DIR / "goldens" / f"{name}.safetensors"
    if not path.is_file():
        return set()
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="session")
def set_dir() -> Path:
    """The parity set's folder."""
    return SET_DIR


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Loads `goldens/<name>.safetensors` of the set."""
    return functools.cache(lambda name: load_file(SET_DIR / "goldens" / f"{name}.safetensors"))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """The set's model. The motion encoder and the keypoint extractor are full size in every set."""
    unet, clip = (_read(f"configs/{name}.json") for name in ("unet", "clip"))
    extra = yaml.safe_load((SET_DIR / "configs" / "inference_stage3.yaml").read_text())["unet_additional_kwargs"]
    return ModelConfig(
        name=f"parity {_read('mini_config.json')['set']}",
        size_px=_read("mini_config.json")["size"],
        unet=UNetConfig(
            in_channels=unet["in_channels"],
            block_channels=tuple(unet["block_out_channels"]),
            attention_levels=tuple(name.startswith("CrossAttn") for name in unet["down_block_types"]),
            layers_per_block=unet["layers_per_block"],
            num_heads=unet["attention_head_dim"],
            cross_attention_dim=unet["cross_attention_dim"],
            num_norm_groups=unet["norm_num_groups"],
            num_motion_heads=extra["motion_module_kwargs"]["num_attention_heads"],
            num_temporal_heads=extra["temporal_module_kwargs"]["num_attention_heads"],
            max_positions=extra["temporal_module_kwargs"]["temporal_position_encoding_max_len"],
        ),
        pose_guider=_pose_guider_config(),
        vae=_vae_config(),
        image_encoder=ImageEncoderConfig(
            image_px=clip["image_size"],
            patch_px=clip["patch_size"],
            hidden_dim=clip["hidden_size"],
            intermediate_dim=clip["intermediate_size"],
            num_layers=clip["num_hidden_layers"],
            num_heads=clip["num_attention_heads"],
            projection_dim=clip["projection_dim"],
            hidden_act=clip["hidden_act"],
            norm_eps=clip["layer_norm_eps"],
        ),
    )


def _vae_config() -> VaeConfig:
    vae = _read("configs/vae.json")
    return VaeConfig(
        block_channels=tuple(vae["block_out_channels"]),
        layers_per_block=vae["layers_per_block"],
        latent_channels=vae["latent_channels"],
        num_norm_groups=vae["norm_num_groups"],
    )


def _pose_guider_config() -> PoseGuiderConfig:
    shapes = _read("manifests/pose_guider.json")
    num_steps = sum(name.startswith("blocks.") and name.endswith(".weight") for name in shapes) // 2
    widest = [shapes[f"blocks.{2 * step + 1}.weight"][0][0] for step in range(num_steps)]
    return PoseGuiderConfig(channels=(shapes["conv_in.weight"][0][0], *widest))


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((SET_DIR / name).read_text())
    return values


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The set's weights in the official layout, rebuilt by its own script once and kept outside the repository."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "personalive-ray"
    folder = cache / f"parity-{_recipe_hash()}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _build_weights(folder)
    return folder


def _recipe_hash() -> str:
    """A hash of all that decides the weights, regardless of the whitespace of the JSON files."""
    recipe = {path.name: path.read_text() for path in (SET_DIR / "synth.py", SET_DIR / "make_mini_weights.py")}
    for path in sorted([SET_DIR / "mini_config.json", *SET_DIR.glob("manifests/*.json"), *SET_DIR.glob("configs/*")]):
        recipe[path.name] = json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _build_weights(folder: Path) -> None:
    """Builds beside `folder` and renames, so that a test run that is cut short leaves no half-filled cache."""
    building = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        script = [sys.executable, "-B", str(SET_DIR / "make_mini_weights.py"), str(SET_DIR), str(building)]
        subprocess.run(script, check=True, capture_output=True, text=True)
        if not folder.is_dir():
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
