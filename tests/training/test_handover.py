"""Networks from a folder or the seed into a phase, and on to the next one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stages.errors import BadConfig, BadWeights
from stages.weights import load_tensors
from training.checkpoints import CheckpointFailed
from training.engine import Run
from training.handover import (
    digest,
    finished_run,
    fresh_network,
    hand_on,
    load_networks,
    start_model,
    whole_networks,
)
from training.phases.phase import Phase
from training.recipes import AutoencoderConfig, smoke

MODEL = smoke().model
MEASURED = dataclasses.replace(MODEL, vae=dataclasses.replace(MODEL.vae, scaling_factor=0.7))
RUN = Run("autoencoder", MODEL, AutoencoderConfig(num_steps=3))
NAMES = ("pose_guider", "image_encoder")


def handed_on(place, names=NAMES, weights=None):
    phase = Phase(MODEL, load_networks(names, MODEL, weights, 1, may_be_fresh=True))
    return phase, hand_on(MEASURED, whole_networks(phase), RUN, weights, place)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_fresh_network_is_a_function_of_seed_and_name_alone():
    states = [fresh_network("pose_guider", MODEL, seed).state_dict() for seed in (1, 1, 2)]
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_drawing_a_network_leaves_the_random_state_as_it_was():
    before = torch.get_rng_state()
    fresh_network("pose_guider", MODEL, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_handed_on_is_what_the_next_phase_starts_from(tmp_path):
    phase, weights = handed_on(tmp_path)
    networks = load_networks(NAMES, MODEL, weights, 9, may_be_fresh=False)
    for name in NAMES:
        assert same(networks[name].state_dict(), phase.networks[name].state_dict())
        assert all(parameter.requires_grad for parameter in networks[name].parameters())


def test_the_measured_scale_goes_along_and_other_sizes_stay_the_recipes(tmp_path):
    _, weights = handed_on(tmp_path)
    wider = dataclasses.replace(MODEL, size_px=128)
    assert start_model(wider, weights) == dataclasses.replace(wider, vae=MEASURED.vae)
    assert start_model(wider, None) == wider


def test_networks_that_a_phase_does_not_know_are_handed_through_untouched(tmp_path):
    _, weights = handed_on(tmp_path / "first")
    _, further = handed_on(tmp_path / "second", ("pose_guider",), weights)
    path = "image_encoder.safetensors"
    assert (further / path).read_bytes() == (weights / path).read_bytes()
    assert load_tensors(further / path)


def test_a_network_that_no_folder_has_is_drawn_or_an_error(tmp_path):
    _, weights = handed_on(tmp_path, ("pose_guider",))
    assert load_networks(NAMES, MODEL, weights, 1, may_be_fresh=True).keys() == set(NAMES)
    with pytest.raises(BadWeights, match="image_encoder is missing"):
        load_networks(NAMES, MODEL, weights, 1, may_be_fresh=False)


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    _, weights = handed_on(tmp_path)
    guider = dataclasses.replace(MODEL.pose_guider, channels=(8, 16))
    with pytest.raises(BadWeights, match="mis-shaped"):
        load_networks(("pose_guider",), dataclasses.replace(MODEL, pose_guider=guider), weights, 1, True)


def test_a_folder_that_is_not_weights_is_refused(tmp_path):
    with pytest.raises(BadConfig, match="not a weights folder"):
        start_model(MODEL, tmp_path)


def test_the_digest_names_contents_and_not_places(tmp_path):
    (_, one), (_, other) = handed_on(tmp_path / "one"), handed_on(tmp_path / "other")
    assert digest(one) == digest(other) != digest(None) == ""
    (other / "pose_guider.safetensors").unlink()
    assert digest(one) != digest(other)


def test_a_phase_has_finished_once_its_weights_are_there(tmp_path):
    assert finished_run(tmp_path) is None
    handed_on(tmp_path)
    assert finished_run(tmp_path)["config"]["num_steps"] == 3
    handed_on(tmp_path)
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "weights/config.json").unlink()
    assert finished_run(tmp_path) is None


def test_weights_that_cannot_be_written_are_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / ".weights.part").write_text("in the way")
    with pytest.raises(CheckpointFailed, match="make room and give the command again"):
        handed_on(tmp_path)
