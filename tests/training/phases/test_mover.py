"""The mover learns where things in the portrait go."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from torch.nn import functional as F

from stages.errors import BadConfig
from stages.networks.mover import Said
from training.clips import Batch
from training.handover import load_networks
from training.identity import sample_identity
from training.known import FIRST_EXPRESSION
from training.motion import from_array
from training.phases.build import build_phase, networks_of
from training.phases.mover import (
    AT_HEAD,
    BESIDE,
    LIT_WITHIN,
    PAINTED,
    UNKNOWN,
    cells_off,
    expression_loss,
    light_loss,
    place_loss,
    shape_loss,
    tint_loss,
    true_expressions,
    true_places,
)
from training.phases.phase import draws
from training.places import BACKDROP, BODY, HEAD, INSIDE, head_shape, light_map
from training.recipes import changed, smoke


def test_a_few_steps_reduce_the_loss(build, learn, batch: Batch):
    losses = learn(build("mover"), batch, 15)
    assert losses[-1] < 0.95 * losses[0]


def test_the_mover_alone_is_trained(build, batch: Batch):
    phase = build("mover")
    names = {name for name, parameter in phase.named_parameters() if parameter.requires_grad}
    assert names and all(name.startswith("networks.pose_guider.mover.") for name in names)


def test_a_perceptual_distance_counts_where_the_config_asks_for_it(build, batch: Batch):
    plain, perceptual = (build("mover", perceptual_weight=weight) for weight in (0.0, 1.0))
    losses = [phase(batch, draws(0, 0, 0, 0), 0, 0, None).loss for phase in (plain, perceptual)]
    assert losses[1] > losses[0]


def test_true_places_teach_what_pictures_of_another_moment_show(batch: Batch):
    shifts, kinds, shown_by, is_seen = true_places(batch, 0, 16)
    assert shifts.shape == (5, 16, 16, 2) and kinds.shape == shown_by.shape == is_seen.shape == (5, 16, 16)
    assert ((kinds == HEAD) == (shown_by == AT_HEAD)).all()
    assert 0.7 < is_seen[kinds == HEAD].mean() < 1 and not is_seen[kinds != HEAD].any()
    assert (shown_by[kinds == INSIDE] == PAINTED).all()
    assert (shown_by[kinds == BACKDROP] == BESIDE).all()
    assert (shown_by == PAINTED).any() and (shown_by == UNKNOWN).any()


def test_a_head_that_turns_shows_what_the_portrait_does_not(batch: Batch):
    assert batch.people is not None
    side, motions = 64, batch.motions.copy()
    motions[:, 0, :3] = 0
    motions[:, 1] = motions[:, 0]
    motions[:, 2] = motions[:, 0]
    motions[:, 2, 1] = 30
    _, kinds, _, is_seen = true_places(dataclasses.replace(batch, motions=motions), 0, side)
    hidden = [((kinds[index] == HEAD) & ~is_seen[index]).sum() for index in range(2)]
    assert hidden[0] < 0.02 * (kinds[0] == HEAD).sum() and hidden[1] > 0.05 * (kinds[1] == HEAD).sum()


def test_taking_the_backdrop_for_the_body_is_an_error_of_places(batch: Batch):
    confused = [dataclasses.replace(said, is_body=-said.is_body) for said in perfect(batch)]
    images, weights = torch.zeros(2, 6, 3, 64, 64), torch.ones(10, 1, 16, 16)
    loss, errors = place_loss(confused, batch, images, weights)
    assert errors["body"] > 30 and loss > 30


def test_expressions_are_asked_for_where_the_portraits_head_is(batch: Batch):
    shifts, kinds = true_expressions(batch, 0, 64)
    assert shifts.shape == (5, 64, 64, 2) and kinds.shape == (5, 64, 64)
    unmoved, portrait = batch.motions.copy(), batch.motions[:, :1]
    unmoved[..., FIRST_EXPRESSION:] = portrait[..., FIRST_EXPRESSION:]
    still, same = true_expressions(dataclasses.replace(batch, motions=unmoved), 0, 64)
    head = same[0] == HEAD
    assert np.abs(still[:, head]).max() < 1e-5
    assert (np.abs(shifts[:, head]).max(-1) > 0.5 / 64).mean() > 0.005
    turned = batch.motions.copy()
    turned[:, 1:, :FIRST_EXPRESSION] += 5
    elsewhere, _ = true_expressions(dataclasses.replace(batch, motions=turned), 0, 64)
    np.testing.assert_array_equal(elsewhere, shifts)


def test_perfect_expressions_cost_nothing_and_others_by_the_weights_of_their_cells(batch: Batch):
    seen = torch.zeros(10, 6, 16, 16)
    for index in range(2):
        shifts, kinds = (torch.from_numpy(part) for part in true_expressions(batch, index, 16))
        part = seen[5 * index : 5 * index + 5]
        part[:, :2] = rearrange(shifts, "f h w c -> f c h w")
        part[:, 2] = torch.where(kinds == INSIDE, 60.0, -60.0)
    even = torch.ones(10, 16, 16)
    assert float(expression_loss(seen, batch, even)[0]) < 1e-6
    seen[:, 0] += 0.1 * torch.eye(16)
    corner = even.clone()
    corner[:, 8:, 8:] = 9.0
    errors = [float(expression_loss(seen, batch, weights)[1]["expressions"]) for weights in (even, corner)]
    assert 0 < errors[0] != pytest.approx(errors[1], rel=1e-3)


def perfect(batch: Batch) -> list[Said]:
    """Everything as `true_places` has it."""
    said = []
    for index in range(2):
        shifts, kinds, shown_by, _ = (torch.from_numpy(part) for part in true_places(batch, index, 16))
        shares = rearrange(50.0 * F.one_hot(shown_by.clamp(min=0), 3), "f h w c -> f c h w")
        colours = torch.zeros(5, 3, 16, 16)
        is_body = rearrange(torch.where(kinds == BODY, 60.0, -60.0), "f h w -> f 1 h w")
        covered = (shares[:, :1] > 0).float()
        said.append(Said(shifts, shifts, colours, shares, colours, torch.ones(5, 3, 16, 16), is_body, covered))
    return said


def test_perfect_places_cost_nothing(batch: Batch):
    _, errors = place_loss(perfect(batch), batch, torch.zeros(2, 6, 3, 64, 64), torch.ones(10, 1, 16, 16))
    assert all(float(error) < 1e-6 for error in errors.values())


def test_errors_count_by_the_weights_of_their_cells(batch: Batch):
    wrong = [
        dataclasses.replace(said, head=said.head + 0.1 * torch.eye(16)[None, :, :, None]) for said in perfect(batch)
    ]
    corner = torch.ones(10, 1, 16, 16)
    corner[..., 8:, 8:] = 9.0
    even, uneven = (
        place_loss(wrong, batch, torch.zeros(2, 6, 3, 64, 64), weights)[1]["head_cells"]
        for weights in (torch.ones(10, 1, 16, 16), corner)
    )
    assert 0 < float(even) != pytest.approx(float(uneven), rel=1e-3)


def test_places_of_which_none_is_known_cost_nothing():
    places = torch.ones(1, 4, 4, 2)
    assert float(cells_off(places, torch.zeros(1, 4, 4, 2), torch.zeros(1, 4, 4))) == 0


def test_filmed_clips_are_learned_from_their_pictures_alone(build, batch: Batch):
    filmed = dataclasses.replace(batch, people=np.full(2, -1))
    metrics = build("mover", poses="extractor", expressions="encoder")(filmed, draws(0, 0, 0, 0), 0, 0, None).metrics
    assert "psnr_db" in metrics and not {"head_cells", "expressions"} & set(metrics)
    with pytest.raises(BadConfig, match="picture_weight"):
        build("mover", poses="extractor", expressions="encoder", picture_weight=0.0)(
            filmed, draws(0, 0, 0, 0), 0, 0, None
        )


def test_without_a_picture_loss_pictures_are_not_composed(build, batch: Batch):
    metrics = build("mover", picture_weight=0.0)(batch, draws(0, 0, 0, 0), 0, 0, None).metrics
    assert {"head_cells", "expressions"} <= set(metrics) and "psnr_db" not in metrics


@pytest.mark.parametrize(
    ("part", "other", "metrics"),
    [
        ("expressions", "depth", {"expressions", "opened"}),
        ("depths", "expression", {"depths", "thickness", "outline", "facing", "light"}),
        ("light", "expression", {"depths", "thickness", "outline", "facing", "light"}),
    ],
)
def test_what_is_seen_in_portraits_can_be_learned_alone(build, learn, batch: Batch, part, other, metrics):
    off = {f"{name}_weight": 0.0 for name in (other, "place", "picture")}
    # By true poses and expressions: what untrained networks find may show no face at all.
    given = {"poses": "truth", "expressions": "truth"}
    phase = build("mover", trained_parts=(f"pose_guider.mover.{part}.",), **given, **off)
    losses = learn(phase, batch, 25)
    assert losses[-1] < 0.9 * losses[0]
    assert set(phase(batch, draws(0, 0, 0, 0), 0, 0, None).metrics) == metrics


def test_perfect_shapes_cost_nothing_wherever_the_keypoints_middle_is(batch: Batch):
    assert batch.people is not None
    told = [
        head_shape(sample_identity(int(number)), from_array(row), 16)
        for number, motions in zip(batch.people, batch.motions, strict=True)
        for row in motions
    ]
    depth, is_head, normals, thickness = (torch.from_numpy(np.stack(part)) for part in zip(*told, strict=True))
    parts = [depth - 0.3, torch.where(is_head, 60.0, -60.0), normals[..., 0], normals[..., 1], thickness]
    said = rearrange(parts, "c (b f) h w -> b f c h w", b=2)
    there = torch.tensor([0.0, 0.0, 0.3]).expand(2, 6, 9, 3)
    assert float(shape_loss(said, there, batch)[0]) < 1e-6
    error, metrics = shape_loss(said, torch.zeros_like(there), batch)
    assert float(error) == pytest.approx(float(metrics["depths"])) and 1 < error < 0.3 * 16 / 2
    said[:, :, 2] += 0.5
    assert float(shape_loss(said, there, batch)[1]["facing"]) == pytest.approx(0.25)
    said[:, :, 4] += 0.25
    assert float(shape_loss(said, there, batch)[1]["thickness"]) == pytest.approx(0.25 * 16 / 2 - 0.5, abs=1e-4)


def test_the_true_light_costs_nothing_and_that_of_others_does(batch: Batch):
    assert batch.people is not None
    true = np.stack([light_map(sample_identity(int(number)), 16)[0] for number in batch.people])
    said = repeat(torch.from_numpy(true), "b h w c -> b f c h w", f=6)
    assert float(light_loss(said, batch)) < 1e-9
    assert float(light_loss(said.flip(0), batch)) > 1e-3


def test_tint_is_what_true_places_do_not_explain():
    ramp = torch.linspace(0, 0.7, 8).expand(3, 8, 8)
    portraits = torch.stack([ramp, 0.7 - ramp])
    shift = torch.zeros(4, 8, 8, 2)
    shift[..., 0] = 2 * 2 / 8
    lit = torch.tensor([0.05, 0.1, 0.15, 0.2])[:, None, None, None].expand(4, 3, 8, 8)
    colours = portraits.repeat_interleave(2, 0).roll(-2, dims=3) + lit
    weights = torch.zeros(4, 8, 8)
    weights[:, 2:5, 1:5] = 1.0
    still, brighter = torch.ones(4, 3, 8, 8), torch.full((4, 3, 8, 8), 1.5)
    assert float(tint_loss(lit, still, colours, portraits, shift, weights)) < 1e-6
    off = tint_loss(lit - 0.2, still, colours, portraits, shift, weights)
    assert float(off) == pytest.approx(0.2 - LIT_WITHIN / 2)
    assert float(tint_loss(lit - 0.2, still, colours, portraits, shift, 0 * weights)) == 0
    explained = 1.5 * (colours - lit) + lit
    assert float(tint_loss(lit, brighter, explained, portraits, shift, weights)) < 1e-6


def test_wrong_tint_is_an_error_of_places(batch: Batch):
    tinted = [dataclasses.replace(said, tint=said.tint + 0.2) for said in perfect(batch)]
    images, weights = torch.zeros(2, 6, 3, 64, 64), torch.ones(10, 1, 16, 16)
    right, wrong = (place_loss(said, batch, images, weights) for said in (perfect(batch), tinted))
    assert wrong[0] > right[0] + 1 and wrong[1]["tint"] == pytest.approx(0.2 - LIT_WITHIN / 2)


def test_a_phase_that_would_learn_nothing_is_refused(build):
    with pytest.raises(BadConfig, match="nothing is learned"):
        build("mover", depth_weight=0.0, expression_weight=0.0, place_weight=0.0, picture_weight=0.0)


def test_the_portrait_at_its_own_motion_is_nearly_right_from_the_start(build, batch: Batch):
    still = dataclasses.replace(
        batch,
        pixels=batch.pixels[:, [0, 0]],
        motions=batch.motions[:, [0, 0]],
        boxes=batch.boxes[:, [0, 0]],
    )
    update = build("mover", poses="truth", pose_noise=0.0, portrait_noise=0.0)(still, draws(0, 0, 0, 0), 0, 0, None)
    assert update.metrics["psnr_db"] > 25


def test_a_model_without_one_is_refused():
    widths = ("mover_channels", "expression_channels", "depth_channels", "light_channels")
    recipe = changed(smoke(), {f"model.pose_guider.{name}": [] for name in widths})
    networks = load_networks(networks_of("mover"), recipe.model, None, 0, True)
    with pytest.raises(BadConfig, match="leave it out"):
        build_phase("mover", recipe, networks, torch.device("cpu"))
