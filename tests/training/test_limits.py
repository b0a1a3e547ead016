"""Senseless numbers of a recipe are refused by name before anything is trained."""

from __future__ import annotations

import pytest

from stages.errors import BadConfig
from training.recipes import RECIPES, find_recipe

SENSELESS = {
    "autoencoder.batch_size": 0,
    "keypoints.num_steps": 0,
    "mover.log_every": 0,
    "motion.checkpoint_every": 0,
    "motion.sampling.num_frames": 0,
    "motion.sampling.stride": 0,
    "motion.level_shares": [0.5, 0.5],
    "motion.drop_pose": 7,
    "keypoints.mild_share": -0.1,
    "distill.optimiser.learning_rate": 0,
    "distill.optimiser.ema_decay": 1,
    "distill.optimiser.betas": [0.9],
    "distill.perceptual_weight": -1,
    "stream.gradient_every": 0,
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_senseless_number_is_refused_by_its_name(name: str):
    with pytest.raises(BadConfig, match=name):
        find_recipe("smoke", {name: SENSELESS[name]})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_as_it_is_makes_sense(name: str):
    assert find_recipe(name).name == name


def test_a_discriminator_that_has_learned_nothing_is_not_listened_to():
    with pytest.raises(BadConfig, match=r"stream\.critic_from_step 9 is behind"):
        find_recipe("smoke", {"stream.critic_from_step": 9, "stream.adversarial_from_step": 3})
    silent = {"stream.critic_from_step": 9, "stream.adversarial_from_step": 3, "stream.adversarial_weight": 0}
    assert find_recipe("smoke", silent).stream.critic_from_step == 9


def test_shares_of_levels_are_one_per_level_and_together_one():
    assert find_recipe("smoke", {"motion.level_shares": [0.2, 0.3, 0.5]}).motion.level_shares == (0.2, 0.3, 0.5)
    with pytest.raises(BadConfig, match="sum is 1"):
        find_recipe("smoke", {"motion.level_shares": [0.2, 0.3, 0.4]})
