"""Small folders in the authors' layout: every form they come in, and every way in which they can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.errors import BadConfig, BadWeights
from stages.official import READERS, is_official, load_official, official_config
from stages.weights import build_network, fill_network

NAMES = ("vae", "image_encoder", "reference_unet", "pose_guider", "denoising_unet")
BASE_UNET = "sd-image-variations-diffusers/unet/diffusion_pytorch_model"
IMAGE_ENCODER = "sd-image-variations-diffusers/image_encoder/pytorch_model"
VAE = "sd-vae-ft-mse/diffusion_pytorch_model"
SIZE_PX = 32

OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def load(folder: Path, *names: str) -> dict[str, dict[str, Tensor]]:
    return {name: network.state_dict() for name, network in load_official(folder, names, SIZE_PX)[1].items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def picked(tensors: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """The tensors with any of these parts in their names."""
    return {name: tensor for name, tensor in tensors.items() if any(part in name for part in parts)}


def without(tensors: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in picked(tensors, *parts)}


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize("safetensors", [False, True])
def test_every_network_has_the_folders_weights(write_official, official_tensors, safetensors):
    found = load(write_official(safetensors=safetensors), *NAMES)
    for name in NAMES:
        assert_equal(found[name], official_tensors[name])


def test_the_config_is_read_from_the_folder(write_official, official_config):
    found = load_official(write_official(), ["vae"], SIZE_PX)[0]
    assert (found.unet, found.vae) == (official_config.unet, official_config.vae)
    assert (found.pose_guider, found.image_encoder) == (official_config.pose_guider, official_config.image_encoder)
    assert (found.size_px, found.name) == (SIZE_PX, "personalive-official")
    assert "academic research" in found.licence


def test_the_picture_size_is_512_unless_told(write_official):
    assert official_config(write_official()).size_px == 512


def test_only_the_named_networks_are_read(write_official):
    folder = write_official({"personalive/denoising_unet": None, "personalive/reference_unet": None})
    assert list(load(folder, "vae", "pose_guider")) == ["vae", "pose_guider"]


def test_a_folder_is_official_by_its_layout(write_official, folder):
    assert is_official(write_official())
    assert not is_official(folder)
    assert not is_official(folder / "config.json")


def test_safetensors_are_preferred_to_pickles(write_official, official_tensors):
    folder = write_official(safetensors=True)
    for path in folder.rglob("*.safetensors"):
        for suffix in (".bin", ".pth"):
            path.with_suffix(suffix).write_bytes(b"never to be read")
    assert_equal(load(folder, "vae")["vae"], official_tensors["vae"])


def test_later_files_override_earlier_ones(write_official, official_files, official_tensors):
    """A tensor in all three files is the temporal module's, one in two files is denoising_unet's."""
    base, temporal = official_files[BASE_UNET], official_files["personalive/temporal_module"]
    wrong = {name: torch.full_like(tensor, 7) for name, tensor in temporal.items()}
    folder = write_official(
        {BASE_UNET: base | wrong, "personalive/denoising_unet": official_files["personalive/denoising_unet"] | wrong}
    )
    assert_equal(load(folder, "denoising_unet")["denoising_unet"], official_tensors["denoising_unet"])


def test_the_base_gives_what_the_later_files_lack(write_official, official_files, official_tensors):
    rest = official_files["personalive/denoising_unet"]
    folder = write_official({"personalive/denoising_unet": without(rest, "conv_in", "mid_block.resnets")})
    found = load(folder, "denoising_unet")["denoising_unet"]
    base = picked(official_files[BASE_UNET], "conv_in", "mid_block.resnets")
    assert len(base) > 10
    assert_equal(found, official_tensors["denoising_unet"] | base)


def test_any_split_between_the_two_files_will_do(write_official, official_files, official_tensors):
    both = official_files["personalive/denoising_unet"] | official_files["personalive/temporal_module"]
    folder = write_official(
        {
            "personalive/denoising_unet": picked(both, "up_blocks"),
            "personalive/temporal_module": without(both, "up_blocks"),
        }
    )
    assert_equal(load(folder, "denoising_unet")["denoising_unet"], official_tensors["denoising_unet"])


def test_position_tables_may_be_there_or_not(write_official, official_files, official_tensors):
    temporal = official_files["personalive/temporal_module"]
    assert len(picked(temporal, "pos_encoder.pe")) == 20
    folder = write_official({"personalive/temporal_module": without(temporal, "pos_encoder.pe")})
    assert_equal(load(folder, "denoising_unet")["denoising_unet"], official_tensors["denoising_unet"])


def test_the_union_must_cover_every_name(write_official, official_files):
    temporal = official_files["personalive/temporal_module"]
    gone = "mid_block.temporal_modules.0.temporal_transformer.proj_in.weight"
    folder = write_official({"personalive/temporal_module": without(temporal, gone)})
    with pytest.raises(BadWeights, match=f"1 missing: {gone}"):
        load(folder, "denoising_unet")


def test_norms_of_resnets_are_alive_although_they_share_their_name_with_dead_ones(official_files, official_tensors):
    stored = official_files["personalive/denoising_unet"]
    alive = official_tensors["denoising_unet"]
    assert picked(stored, "transformer_blocks.0.norm2.") and not picked(alive, "transformer_blocks.0.norm2.")
    assert picked(alive, "resnets.0.norm2.")


def test_a_reference_unet_may_lack_what_has_no_effect(write_official, official_tensors):
    folder = write_official({"personalive/reference_unet": official_tensors["reference_unet"]})
    assert_equal(load(folder, "reference_unet")["reference_unet"], official_tensors["reference_unet"])


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("as_convolutions", [False, True])
def test_vae_attentions_of_both_generations_are_read(write_official, official_tensors, old_names, as_convolutions):
    stored = {}
    for name, tensor in official_tensors["vae"].items():
        if ".attentions." in name and tensor.ndim == 2 and as_convolutions:
            tensor = tensor[:, :, None, None]
        if ".attentions." in name and old_names:
            for new, old in OLD_NAMES.items():
                name = name.replace(new, old)
        stored[name] = tensor
    assert (stored.keys() != official_tensors["vae"].keys()) == old_names
    assert_equal(load(write_official({VAE: stored}), "vae")["vae"], official_tensors["vae"])


def test_position_ids_of_older_image_encoders_are_ignored(write_official, official_files, official_tensors):
    ids = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    folder = write_official({IMAGE_ENCODER: official_files[IMAGE_ENCODER] | ids})
    assert_equal(load(folder, "image_encoder")["image_encoder"], official_tensors["image_encoder"])


def test_the_keypoint_extractor_sheds_its_prefix_and_what_is_never_used(tmp_path, tensors, config):
    """Small, through the reader alone: an official folder is always of full size here."""
    stored = {f"detector.{name}": tensor for name, tensor in tensors["keypoint_extractor"].items()}
    stored |= {"idx_tensor": torch.arange(66.0), "detector.fc_exp.weight": torch.zeros(27, 14)}
    stored |= {"detector.fc_exp.bias": torch.zeros(27)}
    (tmp_path / "personalive").mkdir()
    torch.save(stored, tmp_path / "personalive" / "motion_extractor.pth")
    network = build_network("keypoint_extractor", config)
    found = READERS["keypoint_extractor"](tmp_path, network)
    filled = fill_network("keypoint_extractor", network, found, "here")
    assert_equal(filled.state_dict(), tensors["keypoint_extractor"])


def test_the_motion_encoder_is_read_as_it_is(tmp_path, tensors, config):
    (tmp_path / "personalive").mkdir()
    torch.save(tensors["motion_encoder"], tmp_path / "personalive" / "motion_encoder.pth")
    network = build_network("motion_encoder", config)
    filled = fill_network("motion_encoder", network, READERS["motion_encoder"](tmp_path, network), "here")
    assert_equal(filled.state_dict(), tensors["motion_encoder"])


def test_ordered_dictionaries_and_parameters_are_tensors_too(write_official, official_tensors):
    stored = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in official_tensors["pose_guider"].items())
    found = load(write_official({"personalive/pose_guider": stored}), "pose_guider")["pose_guider"]
    assert_equal(found, official_tensors["pose_guider"])
    assert not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize(
    ("file", "network", "named"),
    [
        ("personalive/pose_guider", "pose_guider", "pose_guider.pth"),
        ("personalive/reference_unet", "reference_unet", "reference_unet.pth"),
        ("personalive/denoising_unet", "denoising_unet", "denoising_unet.safetensors"),
        ("personalive/temporal_module", "denoising_unet", "temporal_module.pth"),
        (BASE_UNET, "denoising_unet", "diffusion_pytorch_model.bin"),
        (VAE, "vae", "diffusion_pytorch_model.safetensors"),
        (IMAGE_ENCODER, "image_encoder", "pytorch_model.bin"),
    ],
)
def test_a_missing_file_is_named_with_its_folder(write_official, file, network, named):
    with pytest.raises(BadWeights) as error:
        load(write_official({file: None}), network)
    assert named in str(error.value) and str(Path(file).parent) in str(error.value)


@pytest.mark.parametrize("part", ["sd-image-variations-diffusers/unet", "sd-vae-ft-mse"])
def test_a_missing_config_is_named(write_official, part):
    folder = write_official()
    (folder / part / "config.json").unlink()
    with pytest.raises(BadWeights, match=rf"{part}/config\.json is missing"):
        load(folder, "pose_guider")


@pytest.mark.parametrize(("text", "reason"), [("{", "not valid JSON"), ("", "not valid JSON"), ("[1]", "JSON object")])
def test_a_damaged_config_is_named(write_official, text, reason):
    folder = write_official()
    (folder / "sd-vae-ft-mse" / "config.json").write_text(text)
    with pytest.raises(BadConfig, match=rf"sd-vae-ft-mse/config\.json.*{reason}"):
        load(folder, "vae")


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("sd-image-variations-diffusers/unet", "cross_attention_dim"),
        ("sd-vae-ft-mse", "block_out_channels"),
        ("sd-image-variations-diffusers/image_encoder", "hidden_act"),
    ],
)
def test_a_config_without_a_key_is_named_with_it(write_official, part, key):
    folder = write_official()
    edit_json(folder / part / "config.json", **{key: None})
    with pytest.raises(BadConfig, match=rf"{part}/config\.json lacks '{key}'"):
        load(folder, "vae")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("sd-image-variations-diffusers/unet", {"block_out_channels": 8}),
        ("sd-image-variations-diffusers/unet", {"down_block_types": [1, 2, 3]}),
        ("sd-vae-ft-mse", {"layers_per_block": "two"}),
        ("sd-image-variations-diffusers/image_encoder", {"hidden_act": "relu"}),
        ("sd-image-variations-diffusers/image_encoder", {"patch_size": "7"}),
    ],
)
def test_a_config_with_a_value_of_a_wrong_kind_is_refused(write_official, part, changes):
    folder = write_official()
    edit_json(folder / part / "config.json", **changes)
    with pytest.raises(BadConfig):
        load(folder, *NAMES)


def test_the_scaling_factor_may_be_written_or_not(write_official):
    folder = write_official()
    assert load_official(folder, [], SIZE_PX)[0].vae.scaling_factor == 0.18215
    edit_json(folder / "sd-vae-ft-mse" / "config.json", scaling_factor=0.5)
    assert load_official(folder, [], SIZE_PX)[0].vae.scaling_factor == 0.5


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_holds_code_is_refused_and_not_run(write_official, tmp_path, legacy):
    folder, trap = write_official(), tmp_path / "sprung"
    path = folder / "personalive" / "pose_guider.pth"
    torch.save({"conv_in.weight": Trap(trap)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadWeights, match=r"pose_guider\.pth is not a file of tensors only"):
        load(folder, "pose_guider")
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap must be one"


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Call(os.system, "true"), "it asks to run posix.system, which is code"),
        (Call(eval, "1"), "it asks to run eval, which is code"),
        (Call(subprocess.Popen, ["true"]), r"it asks to run \w+\.Popen, which is code"),
        (b"no pickle", "it is damaged, or of another kind"),
        (b"", "it is damaged, or of another kind"),
    ],
)
def test_the_reason_of_a_refusal_is_told_without_advice_to_open_it_anyway(write_official, value, reason, legacy):
    folder = write_official()
    path = folder / "personalive" / "pose_guider.pth"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save({"conv_in.weight": value}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadWeights, match=reason) as error:
        load(folder, "pose_guider")
    text = str(error.value)
    advice = ("weights_only", "safe_globals", "pytorch", "torch.load", "trust")
    assert not any(words in text.lower() for words in advice)
    assert len(text) < len(str(path)) + 200 and "\n" not in text


@pytest.mark.parametrize(
    "value",
    [[torch.zeros(1)], {"state_dict": {"conv_in.weight": torch.zeros(1)}}, {"conv_in.weight": 3.0}, torch.zeros(1)],
)
def test_a_pickle_that_is_no_flat_dictionary_of_tensors_is_refused(write_official, value):
    with pytest.raises(BadWeights, match=r"pose_guider\.pth does not hold a flat dictionary of tensors"):
        load(write_official({"personalive/pose_guider": value}), "pose_guider")


@pytest.mark.parametrize("file", ["pose_guider", "reference_unet", "denoising_unet"])
def test_a_pickle_with_names_that_are_no_text_is_refused(write_official, file):
    with pytest.raises(BadWeights, match=rf"{file}\.pth"):
        load(write_official({f"personalive/{file}": {1: torch.zeros(1)}}), file)


@pytest.mark.parametrize("data", [b"", b"no pickle", b"\x80\x02}q\x00", b"PK\x03\x04" + b"\0" * 60, b"\x80\x02.", b"0"])
def test_a_damaged_pickle_is_refused(write_official, data):
    folder = write_official()
    (folder / "personalive" / "pose_guider.pth").write_bytes(data)
    with pytest.raises(BadWeights, match=r"pose_guider\.pth is not a file of tensors only"):
        load(folder, "pose_guider")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_truncated_pickle_is_refused(write_official, share):
    folder = write_official()
    path = folder / "personalive" / "pose_guider.pth"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(BadWeights, match=r"pose_guider\.pth is not a file of tensors only"):
        load(folder, "pose_guider")


@pytest.mark.parametrize(
    ("file", "network"), [("reference_unet", "reference_unet"), ("temporal_module", "denoising_unet")]
)
def test_a_mis_shaped_tensor_is_named(write_official, official_files, file, network):
    stored = official_files[f"personalive/{file}"]
    name = next(name for name in stored if name.endswith("proj_in.bias"))
    folder = write_official({f"personalive/{file}": stored | {name: torch.zeros(3)}})
    with pytest.raises(BadWeights, match=rf"1 mis-shaped: {name} is \(3,\), should be \(\d+,\)") as error:
        load(folder, network)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("network", ["reference_unet", "denoising_unet"])
def test_an_unexpected_tensor_is_named(write_official, official_files, network):
    name = "down_blocks.0.resnets.0.conv3.weight"
    stored = official_files[f"personalive/{network}"] | {name: torch.zeros(3)}
    with pytest.raises(BadWeights, match=f"1 unexpected: {name}"):
        load(write_official({f"personalive/{network}": stored}), network)


def test_sizes_that_contradict_each_other_are_refused(write_official):
    with pytest.raises(BadConfig, match="size_px 30"):
        load_official(write_official(), [], size_px=30)
