"""Recipes are whole configs; what is changed by name is typed, and unknown names are refused."""

from __future__ import annotations

import pytest
import torch

from stages.config import ModelConfig, from_dict, to_dict
from stages.errors import BadConfig, BadWeights
from training.handover import load_networks
from training.phases.build import build_phase, networks_of
from training.recipes import PHASES, RECIPES, Recipe, find_recipe, official


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_has_every_phase(name: str):
    recipe = find_recipe(name)
    assert from_dict(Recipe, to_dict(recipe), "recipe") == recipe
    assert all(recipe.phase(phase).num_steps > 0 for phase in PHASES)


def test_the_official_recipe_has_the_papers_settings():
    recipe = official()
    assert recipe.model == ModelConfig()
    assert [recipe.phase(phase).num_steps for phase in ("motion", "distill", "stream")] == [30_000, 30_000, 10_000]
    assert (recipe.distill.perceptual_weight, recipe.distill.adversarial_weight) == (2.0, 0.05)
    assert recipe.motion.optimiser.learning_rate == 1e-5 and recipe.stream.sampling.num_frames == 40


def test_a_field_is_changed_by_its_dotted_name():
    assert find_recipe("smoke", {"motion.optimiser.learning_rate": 0.5}).motion.optimiser.learning_rate == 0.5


@pytest.mark.parametrize("name", ["motion.learning_rate", "motions.num_steps", "seed.x", "motion.optimiser.lr"])
def test_an_unknown_field_is_refused_by_name(name: str):
    with pytest.raises(BadConfig, match=name):
        find_recipe("smoke", {name: 1})


def test_a_wrong_type_is_refused():
    with pytest.raises(BadConfig, match="num_steps"):
        find_recipe("smoke", {"motion.num_steps": "many"})


def test_files_are_named_as_text_and_read_when_the_phase_is_built():
    recipe = find_recipe("smoke", {"distill.lpips_vgg": "vgg16.pth", "distill.lpips_linear": "vgg.pth"})
    assert from_dict(Recipe, to_dict(recipe), "recipe").distill.lpips_vgg == "vgg16.pth"
    networks = load_networks(networks_of("distill"), recipe.model, None, 0, True)
    with pytest.raises(BadWeights, match=r"vgg16\.pth"):
        build_phase("distill", recipe, networks, torch.device("cpu"))


def test_an_unknown_recipe_or_phase_names_those_that_exist():
    with pytest.raises(BadConfig, match="tiny"):
        find_recipe("large")
    with pytest.raises(BadConfig, match="distill"):
        official().phase("refine")
