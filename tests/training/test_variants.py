"""What every variant changes, shares and is trained for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.phases.stream import updates_per_clip
from training.recipes import changed, smoke, tiny
from training.variants import FULL, recipe_of, scheduled, variants


@pytest.fixture
def every():
    return variants(tiny())


def test_full_is_the_recipe_itself(every):
    assert next(iter(every)) == "full"
    assert recipe_of(every["full"], tiny()) == tiny()


def test_variants_share_every_phase_before_the_first_that_they_change(every):
    chains = {name: variant.chain for name, variant in every.items() if variant.chain != FULL}
    assert chains == {
        "without-distillation": ("without-distillation/stream",),
        "without-gan": ("without-gan/distill", "without-gan/stream"),
        "without-sliding": ("full/distill", "without-sliding/stream"),
        "chunk-causal": ("full/distill", "chunk-causal/stream"),
        "half-chunk": ("full/distill", "half-chunk/stream"),
    }


def test_each_variant_changes_what_it_is_named_for(every):
    assert recipe_of(every["without-gan"], tiny()).distill.adversarial_weight == 0
    assert recipe_of(every["chunk-causal"], tiny()).model.unet.chunk_causal == 4
    assert recipe_of(every["half-chunk"], tiny()).model.window.chunk_frames == 2
    sliding = recipe_of(every["without-sliding"], tiny()).stream
    assert not sliding.sliding and not sliding.portrait_start
    assert every["without-keyframes"].window == {"max_keyframes": 0}
    assert every["without-interpolated-start"].window == {"interpolated_start": False}


@pytest.mark.parametrize("recipe", [tiny(), smoke()], ids=lambda recipe: recipe.name)
def test_every_variant_differs_from_full(recipe):
    for name, variant in variants(recipe).items():
        own = replace(recipe_of(variant, recipe).model.window, **variant.window)
        same = recipe_of(variant, recipe) == recipe and own == recipe.model.window and variant.chain == FULL
        assert same == (name == "full")


def test_thresholds_are_swept_around_the_recipes_own_as_in_the_paper(every):
    own = tiny().model.window.keyframe_threshold
    swept = [every[f"threshold-{number}"].window["keyframe_threshold"] / own for number in (15, 16, 18, 20)]
    assert swept == pytest.approx([15 / 17, 16 / 17, 18 / 17, 20 / 17])


@pytest.mark.parametrize("recipe", [tiny(), smoke()], ids=lambda recipe: recipe.name)
def test_every_stream_phase_makes_as_many_updates(recipe):
    recipe = changed(recipe, {"stream.num_steps": 60})
    for variant in variants(recipe).values():
        own = recipe_of(variant, recipe)
        updates = own.stream.num_steps * updates_per_clip(own.stream, own.model.window)
        assert updates == pytest.approx(60 * updates_per_clip(recipe.stream, recipe.model.window), abs=4)


def test_what_begins_at_some_step_moves_with_a_shorter_budget():
    begins = {"distill.adversarial_from_step": 200, "distill.critic_from_step": 100}
    whole = changed(tiny(), {"distill.num_steps": 1000, **begins})
    short = changed(whole, scheduled(whole.distill, "distill", 250)).distill
    assert (short.num_steps, short.adversarial_from_step, short.critic_from_step) == (250, 50, 25)
    assert short.optimiser.num_warmup_steps == 25
    same = changed(whole, scheduled(whole.distill, "distill", whole.distill.num_steps))
    assert same == whole and replace(same, seed=3) != whole
