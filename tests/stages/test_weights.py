"""Folders in the project's own format: what is saved is loaded, what does not fit is named."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.config import ModelConfig, load_config
from stages.errors import BadConfig, BadWeights
from stages.networks.layers import temporal_positions
from stages.networks.motion_encoder import sinusoids
from stages.weights import (
    MAX_NAMED_TENSORS,
    NETWORKS,
    TINY,
    build_network,
    check_tensors,
    fill_network,
    load_folder,
    load_tensors,
    save_folder,
)


@pytest.fixture
def copied(folder, tmp_path):
    """A folder that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def edited(folder, name: str, edit) -> None:
    """Rewrites one network's file."""
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def tensors_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those too that no file holds."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def test_a_saved_folder_is_loaded_bit_by_bit(folder, tensors, config):
    loaded_config, networks = load_folder(folder, NETWORKS)
    assert loaded_config == config
    assert networks.keys() == NETWORKS.keys()
    for name, network in networks.items():
        state = network.state_dict()
        assert state.keys() == tensors[name].keys()
        for key, tensor in state.items():
            assert tensor.dtype == tensors[name][key].dtype and torch.equal(tensor, tensors[name][key]), key


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_of_a_loaded_network_is_left_without_memory(folder, networks, name):
    """Tables that no file holds are computed, while the network is built on the meta device."""
    loaded, original = (tensors_of(network) for network in (load_folder(folder, [name])[1][name], networks[name]))
    assert loaded.keys() == original.keys()
    for key, tensor in loaded.items():
        assert tensor.device.type == "cpu", key
        assert torch.equal(tensor, original[key]), key


def test_computed_tables_are_those_of_the_config(folder, config):
    _, networks = load_folder(folder, ["denoising_unet", "motion_encoder"])
    tables = [tensor for key, tensor in networks["denoising_unet"].named_buffers() if key.endswith("positions")]
    assert len(tables) == 10
    assert all(torch.equal(table, temporal_positions(20, table.shape[1])) for table in tables)
    assert torch.equal(networks["motion_encoder"].pe[0], sinusoids(5, 6))


def test_loaded_networks_are_for_inference(folder):
    for network in load_folder(folder, ["vae", "motion_encoder"])[1].values():
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_weights_keep_the_precision_they_are_stored_in(tmp_path, tensors, config):
    half = {key: tensor.half() for key, tensor in tensors["pose_guider"].items()}
    save_folder(tmp_path, config, {"pose_guider": half})
    _, networks = load_folder(tmp_path, ["pose_guider"])
    assert {tensor.dtype for tensor in networks["pose_guider"].state_dict().values()} == {torch.float16}


def test_only_the_named_networks_are_read(copied):
    for name in NETWORKS:
        if name != "vae":
            (copied / f"{name}.safetensors").unlink()
    assert list(load_folder(copied, ["vae"])[1]) == ["vae"]


def test_saving_makes_the_folder_and_takes_tensors_of_any_layout(tmp_path, tensors, config):
    transposed = tensors["pose_guider"]["conv_in.weight"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not transposed.is_contiguous()
    state = tensors["pose_guider"] | {"conv_in.weight": transposed}
    save_folder(tmp_path / "new" / "folder", config, {"pose_guider": state})
    _, networks = load_folder(tmp_path / "new" / "folder", ["pose_guider"])
    assert torch.equal(networks["pose_guider"].conv_in.weight, tensors["pose_guider"]["conv_in.weight"])


def test_the_bundled_weights_fit_their_config():
    config, networks = load_folder(TINY, NETWORKS)
    assert config == load_config(TINY)
    assert networks.keys() == NETWORKS.keys()


def test_a_missing_file_is_named(copied):
    (copied / "vae.safetensors").unlink()
    with pytest.raises(BadWeights, match=r"vae\.safetensors is missing"):
        load_folder(copied, ["vae"])


@pytest.mark.parametrize("data", [b"", b"no tensors at all", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_named(copied, data):
    (copied / "vae.safetensors").write_bytes(data)
    with pytest.raises(BadWeights, match=r"vae\.safetensors is not a readable safetensors file"):
        load_folder(copied, ["vae"])


def test_a_truncated_file_is_named(copied):
    data = (copied / "vae.safetensors").read_bytes()
    (copied / "vae.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadWeights, match=r"vae\.safetensors is not a readable safetensors file"):
        load_folder(copied, ["vae"])


def test_a_folder_in_a_files_place_is_named(tmp_path):
    (tmp_path / "vae.safetensors").mkdir()
    with pytest.raises(BadWeights, match=r"vae\.safetensors is not a readable"):
        load_tensors(tmp_path / "vae.safetensors")


def test_a_folder_without_config_is_no_weights_folder(copied):
    (copied / "config.json").unlink()
    with pytest.raises(BadConfig, match=r"config\.json is missing"):
        load_folder(copied, ["vae"])


def test_a_mis_shaped_tensor_is_named_with_both_shapes(copied):
    edited(copied, "pose_guider", lambda tensors: tensors.update({"conv_in.bias": torch.zeros(5)}))
    message = "1 mis-shaped: conv_in.bias is (5,), should be (4,)"
    with pytest.raises(BadWeights, match=re.escape(message)) as error:
        load_folder(copied, ["pose_guider"])
    assert "pose_guider.safetensors (pose_guider) does not fit its config" in str(error.value)


def test_a_missing_tensor_is_named(copied):
    edited(copied, "pose_guider", lambda tensors: tensors.pop("blocks.1.weight"))
    with pytest.raises(BadWeights, match=r"1 missing: blocks\.1\.weight\b"):
        load_folder(copied, ["pose_guider"])


def test_an_unexpected_tensor_is_named(copied):
    edited(copied, "pose_guider", lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(BadWeights, match=r"1 unexpected: extra\b"):
        load_folder(copied, ["pose_guider"])


def test_all_that_is_wrong_is_said_at_once():
    expected = {"a": torch.Size([2]), "b": torch.Size([3]), "c": torch.Size([4])}
    found = {"a": torch.zeros(2), "b": torch.zeros(3, 1), "d": torch.zeros(1)}
    with pytest.raises(BadWeights) as error:
        check_tensors(expected, found, "here")
    text = "here does not fit its config: 1 missing: c; 1 unexpected: d; 1 mis-shaped: b is (3, 1), should be (3,)"
    assert str(error.value).startswith(text)


def test_of_many_wrong_tensors_the_first_few_are_named():
    expected = {f"t{number:02d}": torch.Size([1]) for number in range(MAX_NAMED_TENSORS + 3)}
    with pytest.raises(BadWeights) as error:
        check_tensors(expected, {}, "here")
    assert f"{MAX_NAMED_TENSORS + 3} missing: t00, t01" in str(error.value)
    assert ", t07 and 3 more" in str(error.value)


def test_weights_of_other_sizes_do_not_fit(copied, config):
    larger = dataclasses.replace(config.pose_guider, channels=(4, 6, 10, 15))
    network = build_network("pose_guider", dataclasses.replace(config, pose_guider=larger))
    tensors = load_file(copied / "pose_guider.safetensors")
    with pytest.raises(BadWeights, match=r"blocks\.5\.weight is \(14, 10, 3, 3\), should be \(15, 10, 3, 3\)"):
        fill_network("pose_guider", network, tensors, "here")


def test_weights_that_are_no_fractions_are_refused(copied):
    edited(copied, "pose_guider", lambda tensors: tensors.update({"conv_in.bias": torch.zeros(4, dtype=torch.int64)}))
    with pytest.raises(BadWeights, match=r"conv_in\.bias"):
        load_folder(copied, ["pose_guider"])


@pytest.mark.parametrize("name", ["denoising_unet", "reference_unet"])
def test_sizes_that_no_network_can_have_name_the_network(config, name):
    unet = dataclasses.replace(config.unet, num_norm_groups=5)
    with pytest.raises(BadConfig, match=f"{name} cannot be built from these sizes"):
        build_network(name, dataclasses.replace(config, unet=unet))


def test_building_takes_no_memory():
    network = build_network("denoising_unet", ModelConfig())
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in network.parameters()) > 1.6e9
