"""Converting a small official folder; motion encoder and keypoint extractor, always of full size, are zeros."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.config import ModelConfig, load_config
from stages.convert import main
from stages.official import LICENCE, is_official
from stages.weights import NETWORKS, build_network, load_folder

SMALL_NETWORKS = ("vae", "image_encoder", "reference_unet", "pose_guider", "denoising_unet")


def zeros_like_network(name: str) -> dict[str, Tensor]:
    """Full-size weights that take no room, in memory or in the file."""
    state = build_network(name, ModelConfig()).state_dict()
    return {key: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in state.items()}


@pytest.fixture(scope="module")
def official(official_writer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all networks in it."""
    extractor = {f"detector.{name}": tensor for name, tensor in zeros_like_network("keypoint_extractor").items()}
    full = {"motion_encoder": zeros_like_network("motion_encoder"), "motion_extractor": extractor}
    changes = {f"personalive/{name}": tensors for name, tensors in full.items()}
    return official_writer(tmp_path_factory.mktemp("official"), changes)


@pytest.fixture(scope="module")
def converted(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same, converted by the command line. A third of a gigabyte, which does not stay."""
    out = tmp_path_factory.mktemp("converted") / "new"
    assert main([str(official), str(out), "--size-px", "32"]) == 0
    yield out
    shutil.rmtree(out)


def test_a_converted_folder_has_the_same_weights(converted, official_tensors):
    _, networks = load_folder(converted, SMALL_NETWORKS)
    for name, network in networks.items():
        state = network.state_dict()
        assert state.keys() == official_tensors[name].keys()
        for key, tensor in state.items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, official_tensors[name][key]), key


def test_a_converted_folder_is_whole_and_ours(converted, official_config):
    assert {path.name for path in converted.iterdir()} == {"config.json", *(f"{name}.safetensors" for name in NETWORKS)}
    assert not is_official(converted)
    assert load_config(converted) == replace(official_config, licence=LICENCE)
    assert load_folder(converted, ["motion_encoder", "keypoint_extractor"])


def test_fp16_is_stored_for_all_but_counters(official, official_tensors, tmp_path):
    out = tmp_path / "half"
    try:
        assert main([str(official), str(out), "--size-px", "32", "--dtype", "fp16"]) == 0
        _, networks = load_folder(out, [*SMALL_NETWORKS, "motion_encoder"])
    finally:
        shutil.rmtree(out)
    counters = {key for key in networks["motion_encoder"].state_dict() if key.endswith("num_batches_tracked")}
    for key, tensor in networks.pop("motion_encoder").state_dict().items():
        assert tensor.dtype == (torch.int64 if key in counters else torch.float16), key
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, official_tensors[name][key].half()), key


def test_the_licence_is_said_before_the_first_network_is_read(write_official, tmp_path, capsys):
    assert main([str(write_official()), str(tmp_path / "out")]) == 2
    licence, failure = capsys.readouterr().err.split(f"Licence: {LICENCE}.")
    assert licence == "" and "error: " in failure


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, [], "motion_extractor.pth"),
        ({}, ["--size-px", "30"], "size_px 30 is not a multiple"),
        ({}, ["--size-px", "-8"], "size_px -8 must be more than 0"),
        ({"personalive/pose_guider": None}, [], "pose_guider.pth"),
        ({"personalive/pose_guider": [1]}, [], "flat dictionary of tensors"),
    ],
)
def test_what_cannot_be_converted_ends_with_the_reason(write_official, tmp_path, capsys, changes, options, words):
    assert main([str(write_official(changes)), str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err and words in captured.err


def test_a_folder_that_is_not_official_is_refused_before_anything_is_written(folder, tmp_path, capsys):
    for source in (folder, tmp_path / "none"):
        assert main([str(source), str(tmp_path / "out")]) == 2
        assert "not an official weights folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_a_folder_ends_with_code_2(official, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(official), str(tmp_path / "file"), "--size-px", "32"]) == 2
    assert "error: " in capsys.readouterr().err


def test_an_unknown_precision_is_refused(official, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(official), str(tmp_path), "--dtype", "fp8"])
    assert end.value.code == 2
    assert "fp8" in capsys.readouterr().err
