import dataclasses
import json
import re

import pytest

from stages.config import (
    HeadConfig,
    KeypointConfig,
    ModelConfig,
    PoseGuiderConfig,
    UNetConfig,
    VaeConfig,
    WindowConfig,
    from_dict,
    load_config,
    save_config,
    to_dict,
)
from stages.errors import BadConfig
from stages.weights import TINY


def changed(config: ModelConfig, section: str | None, changes: dict) -> ModelConfig:
    if section is None:
        return dataclasses.replace(config, **changes)
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def test_a_config_survives_json(config):
    for original in (config, ModelConfig()):
        assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(original)))) == original


def test_a_saved_config_is_loaded_again(config, tmp_path):
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config


def test_what_a_config_leaves_out_is_the_official_models():
    assert from_dict(ModelConfig, {}) == ModelConfig()
    partial = from_dict(ModelConfig, {"window": {"prediction": "sample"}})
    assert partial.window == dataclasses.replace(WindowConfig(), prediction="sample")


def test_the_bundled_config_is_live_at_256():
    tiny = load_config(TINY)
    assert (tiny.name, tiny.size_px, tiny.licence) == ("tiny", 256, "Apache-2.0")


def test_the_defaults_are_the_official_sizes():
    official = ModelConfig()
    assert official.latent_shape == (4, 64, 64)
    assert official.vae.downscale == 8
    assert (official.window.num_levels, official.window.num_frames) == (4, 16)
    assert official.window.num_transition_frames == 12


def test_sizes_follow_from_chunk_and_levels_apart():
    window = WindowConfig(chunk_frames=5, timesteps=(0, 300, 650))
    assert (window.num_levels, window.num_frames, window.num_transition_frames) == (3, 15, 10)


def test_a_config_from_before_chunk_causal_attention_sees_the_whole_window(config):
    values = to_dict(config)
    del values["unet"]["chunk_causal"], values["window"]["interpolated_start"]
    assert from_dict(ModelConfig, values) == config
    assert (config.unet.chunk_causal, config.window.interpolated_start) == (0, True)


def test_chunk_causal_attention_is_by_the_windows_own_chunks(config):
    frames = config.window.chunk_frames
    assert changed(config, "unet", {"chunk_causal": frames}).unet.chunk_causal == frames
    with pytest.raises(BadConfig, match=f"chunk_causal {frames + 1} is neither 0 nor window.chunk_frames {frames}"):
        changed(config, "unet", {"chunk_causal": frames + 1})


def test_every_patch_and_every_halving_shrinks_the_latent(config):
    assert VaeConfig(block_channels=(8, 8, 8), pixel_patch=5, latent_patch=2).downscale == 40
    assert config.latent_shape == (12, 6, 6)


def test_squares_and_halvings_shrink_the_canvas_too(config):
    guider = PoseGuiderConfig(channels=(5, 7), pixel_patch=4, shows_portrait=True)
    assert (guider.downscale, guider.canvas_channels) == (8, 9)
    assert dataclasses.replace(config, pose_guider=guider).pose_guider == guider


def test_the_official_canvas_holds_the_drawn_keypoints_alone():
    assert (PoseGuiderConfig().downscale, PoseGuiderConfig().canvas_channels) == (8, 3)


@pytest.mark.parametrize("values", [{"centre": (0.0, 0.1)}, {"radii": (1.0, 1.0, 1.0, 1.0)}])
def test_a_head_has_three_axes(config, values):
    with pytest.raises(BadConfig, match="three numbers each"):
        changed(config, "pose_guider", {"head": HeadConfig(**values)})


def test_the_middle_of_a_head_may_lie_on_any_side(config):
    head = HeadConfig(centre=(-0.5, 0.0, -0.2), margin=0.0)
    assert changed(config, "pose_guider", {"head": head}).pose_guider.head == head


@pytest.mark.parametrize(
    ("values", "where", "unknown", "known"),
    [
        ({"windows": {}}, "config.json", "windows", "window"),
        ({"unet": {"heads": 3, "extra": 1}}, "config.json.unet", "extra, heads", "num_heads"),
    ],
)
def test_unknown_keys_are_named_with_the_known_ones(values, where, unknown, known):
    with pytest.raises(BadConfig) as error:
        from_dict(ModelConfig, values, "config.json")
    start, listed = str(error.value).split("; known are ")
    assert start == f"{where}: unknown key {unknown}"
    assert known in listed.split(", ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size_px": "512"}, "config.size_px: expected int, got '512'"),
        ({"size_px": 512.0}, "config.size_px: expected int, got 512.0"),
        ({"size_px": None}, "config.size_px: expected int, got None"),
        ({"size_px": True}, "config.size_px: expected int, got True"),
        ({"name": 3}, "config.name: expected str, got 3"),
        ({"unet": 3}, "config.unet: expected an object, got 3"),
        ({"unet": {"block_channels": 8}}, "config.unet.block_channels: expected a list, got 8"),
        ({"unet": {"block_channels": "8888"}}, "config.unet.block_channels: expected a list, got '8888'"),
        ({"unet": {"attention_levels": [1, 0]}}, "config.unet.attention_levels: expected bool, got 1"),
        ({"vae": {"mid_attention": 1}}, "config.vae.mid_attention: expected bool, got 1"),
        ({"vae": {"scaling_factor": "0.5"}}, "config.vae.scaling_factor: expected float, got '0.5'"),
        ({"keypoints": {"colours": [[255, 0, "x"]]}}, "config.keypoints.colours: expected int, got 'x'"),
        ({"keypoints": {"colours": [255]}}, "config.keypoints.colours: expected a list, got 255"),
        ({"window": {"prediction": "velocity"}}, "config.window.prediction: 'velocity' is not one of epsilon, sample"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_path(values, message):
    with pytest.raises(BadConfig, match=re.escape(message)):
        from_dict(ModelConfig, values)


@pytest.mark.parametrize(
    "values", [{"size_px": False}, {"window": {"first_keyframe_call": False}}, {"vae": {"scaling_factor": True}}]
)
def test_true_and_false_are_no_numbers(values):
    with pytest.raises(BadConfig, match="expected"):
        from_dict(ModelConfig, values)


def test_a_whole_number_may_stand_where_a_fraction_is_meant():
    window = from_dict(WindowConfig, {"keyframe_threshold": 5})
    assert window.keyframe_threshold == 5.0 and isinstance(window.keyframe_threshold, float)


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        (None, {"size_px": 44}, ["size_px 44", "VAE's 8"]),
        ("unet", {"in_channels": 9}, ["unet.in_channels 9", "vae.latent_channels"]),
        ("vae", {"latent_patch": 1, "pixel_patch": 4}, ["unet.in_channels 12", "latent_patch"]),
        ("vae", {"kept_detail": 0.5}, ["vae.kept_detail 0.5", "pose_guider.shows_portrait"]),
        ("pose_guider", {"channels": (4, 6, 10)}, ["pose guider shrinks by 4", "VAE by 8"]),
        ("pose_guider", {"pixel_patch": 3}, ["pose guider shrinks by 24", "VAE by 8"]),
        (
            "pose_guider",
            {"pixel_patch": 2, "channels": (4, 6, 10), "shows_portrait": True, "mover_channels": (4, 8)},
            ["expression_channels are two numbers"],
        ),
        (
            "pose_guider",
            {
                "pixel_patch": 2,
                "channels": (4, 6, 10),
                "shows_portrait": True,
                "mover_channels": (4, 8),
                "expression_channels": (4, 8),
                "depth_channels": (4,),
            },
            ["depth_channels are two numbers"],
        ),
        (
            "pose_guider",
            {"pixel_patch": 2, "channels": (4, 6, 10), "light_channels": (4, 8)},
            ["light_channels are two numbers"],
        ),
        (
            "keypoints",
            {"upright_channels": (4, 6), "upright_depths": (0, 1), "upright_px": 30},
            ["keypoints.upright_px 30"],
        ),
        ("keypoints", {"upright_channels": (4, 6)}, ["keypoints.upright_depths differ"]),
        ("unet", {"attention_levels": (False, False, False)}, ["unet.attention_levels", "portrait"]),
        ("unet", {"attention_levels": (True, True)}, ["unet.attention_levels", "block"]),
        ("unet", {"max_positions": 5}, ["6 window frames", "unet.max_positions 5"]),
        ("window", {"chunk_frames": 7}, ["21 window frames", "unet.max_positions 20"]),
        ("window", {"chunk_frames": 0}, ["window.chunk_frames 0"]),
        ("window", {"timesteps": (0,)}, ["two levels"]),
        ("window", {"timesteps": (0, 650, 300)}, ["window.timesteps"]),
        ("window", {"timesteps": (0, 300, 300)}, ["window.timesteps"]),
        ("keypoints", {"colours": ((255, 0, 0),) * 3}, ["keypoints.colours", "drawn"]),
        ("keypoints", {"drawn": (1, 3, 9, 5)}, ["keypoints.drawn", "num_keypoints"]),
        ("keypoints", {"image_px": 40}, ["keypoints.image_px 40", "extractor's 16"]),
        ("keypoints", {"image_px": 8}, ["keypoints.image_px 8", "extractor's 16"]),
        ("keypoints", {"gathered_cells": 4}, ["keypoints.gathered_cells 4", "last map, 2"]),
        ("keypoints", {"depths": (1, 2, 1)}, ["keypoints.dims", "keypoints.depths"]),
        ("motion_encoder", {"crop_px": 28}, ["motion_encoder.crop_px 28", "multiple of 8"]),
        ("motion_encoder", {"hourglass_depth": 3}, ["motion_encoder.crop_px 24", "hourglass_depth"]),
        ("image_encoder", {"projection_dim": 11}, ["image_encoder.projection_dim", "unet.cross_attention_dim"]),
    ],
)
def test_a_contradiction_between_sizes_names_both(config, section, changes, named):
    with pytest.raises(BadConfig) as error:
        changed(config, section, changes)
    for words in named:
        assert words in str(error.value)


@pytest.mark.parametrize("timesteps", [(-5, 300, 650), (0, 300, 1000)])
def test_timesteps_outside_the_schedule_are_refused(config, timesteps):
    with pytest.raises(BadConfig, match="timesteps"):
        changed(config, "window", {"timesteps": timesteps})


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        (None, {"size_px": 0}, "size_px"),
        ("keypoints", {"drawn": (1, 3, -1, 5)}, "drawn"),
        ("motion_encoder", {"token_dim": 3}, "token_dim"),
        ("unet", {"num_heads": 3}, "num_heads"),
        ("image_encoder", {"num_heads": 4}, "num_heads"),
    ],
)
def test_a_size_that_no_network_can_run_with_is_refused(config, section, changes, named):
    with pytest.raises(BadConfig, match=named):
        changed(config, section, changes)


SECTIONS = {None: ModelConfig} | {
    field.name: field.default_factory for field in dataclasses.fields(ModelConfig) if field.type.endswith("Config")
}
NUMBERS = [
    (section, field.name)
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
    if field.type in ("int", "float")
]


@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_no_number_is_negative_and_the_field_is_named(config, section, name):
    with pytest.raises(BadConfig, match=rf"{section + '.' if section else ''}{name} -1 must be"):
        changed(config, section, {name: -1})


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (None, {"size_px": 0}, "size_px 0 must be more than 0"),
        ("unet", {"num_heads": 0}, "unet.num_heads 0 must be more than 0"),
        ("unet", {"block_channels": (8, 0, 24)}, "unet.block_channels 0 must be more than 0"),
        ("unet", {"block_channels": ()}, "unet.block_channels must not be empty"),
        ("vae", {"block_channels": ()}, "vae.block_channels must not be empty"),
        (
            "pose_guider",
            {"head": HeadConfig(radii=(1.0, -1.0, 1.0))},
            "pose_guider.head.radii -1.0 must be more than 0",
        ),
        ("vae", {"scaling_factor": float("nan")}, "vae.scaling_factor nan must be finite"),
        ("vae", {"scaling_factor": 0.0}, "vae.scaling_factor 0.0 must be more than 0"),
        ("image_encoder", {"norm_eps": float("inf")}, "image_encoder.norm_eps inf must be finite"),
        ("keypoints", {"box_factor": float("-inf")}, "keypoints.box_factor -inf must be finite"),
        ("keypoints", {"colours": ((256, 0, 0),) * 4}, "keypoints.colours are three numbers of 0 to 255"),
        ("keypoints", {"colours": ((255, 0),) * 4}, "keypoints.colours are three numbers of 0 to 255"),
        ("keypoints", {"drawn": ()}, "keypoints.drawn must not be empty"),
        ("pose_guider", {"channels": ()}, "pose_guider.channels must not be empty"),
        ("window", {"timesteps": ()}, "window.timesteps must not be empty"),
        ("window", {"beta_end": 1.0}, "window.beta_end and 1 must increase"),
        ("window", {"beta_start": 0.5}, "window.beta_start, window.beta_end"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(config, section, changes, message):
    with pytest.raises(BadConfig, match=re.escape(message)):
        changed(config, section, changes)


def test_numbers_that_may_be_zero_are_taken(config):
    zeros = {"max_keyframes": 0, "keyframe_threshold": 0.0, "first_keyframe_call": 0}
    assert changed(config, "window", zeros).window.max_keyframes == 0


def test_sections_are_checked_when_a_config_is_read():
    with pytest.raises(BadConfig, match=r"size_px 44 is not a multiple"):
        from_dict(ModelConfig, {"size_px": 44})


def test_configs_are_values():
    assert UNetConfig() == UNetConfig() and hash(ModelConfig()) == hash(ModelConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        KeypointConfig().radius_px = 3


def test_a_missing_config_says_which_file(tmp_path):
    with pytest.raises(BadConfig, match=r"config\.json is missing"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"",
        b"\xff\xfe{}",
        '{"name": "ü"}'.encode("latin-1"),
        b'{"a":' * 100_000,
        b'{"size_px": 1' + b"0" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
    ids=["cut", "empty", "bytes", "latin-1", "nested", "endless number", "byte order mark"],
)
def test_a_damaged_config_says_which_file(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(BadConfig, match=r"config\.json is not valid JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '"tiny"', "null"])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadConfig, match=r"config\.json"):
        load_config(tmp_path)


def test_a_config_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BadConfig, match=r"config\.json cannot be read .*readable file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"vae": {"scaling_factor": NaN}}', "vae.scaling_factor nan"),
        ('{"window": {"keyframe_threshold": Infinity}}', "window.keyframe_threshold inf"),
        ('{"window": {"keyframe_threshold": 1e999}}', "window.keyframe_threshold inf"),
        (f'{{"window": {{"keyframe_threshold": 1{"0" * 400}}}}}', "window.keyframe_threshold: the number"),
        (f'{{"size_px": 1{"0" * 400}}}', "size_px: the number"),
    ],
)
def test_numbers_that_only_json_can_write_are_named(tmp_path, text, named):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadConfig, match=re.escape(named)):
        load_config(tmp_path)


def test_a_config_is_utf_8_whatever_the_machine_prefers(config, tmp_path):
    save_config(dataclasses.replace(config, name="Ü"), tmp_path)
    (tmp_path / "config.json").write_bytes((tmp_path / "config.json").read_bytes().replace(b"\\u00dc", "Ü".encode()))
    assert load_config(tmp_path).name == "Ü"
