"""The mover learns where things in the portrait go."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from stages.errors import BadConfig
from stages.networks.mover import Said
from training.clips import Batch
from training.handover import load_networks
from training.phases.build import build_phase, networks_of
from training.phases.mover import AT_HEAD, BESIDE, PAINTED, UNKNOWN, cells_off, place_loss, true_places
from training.phases.phase import draws
from training.places import HEAD, INSIDE
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
    shifts, kinds, shown_by = true_places(batch, 0, 16)
    assert shifts.shape == (5, 16, 16, 2) and kinds.shape == shown_by.shape == (5, 16, 16)
    assert (kinds[shown_by == AT_HEAD] == HEAD).all()
    assert (shown_by[kinds == HEAD] == AT_HEAD).mean() > 0.7
    assert (shown_by[kinds == INSIDE] == PAINTED).all()
    assert (shown_by == PAINTED).any() and (shown_by == BESIDE).any() and (shown_by == UNKNOWN).any()


def perfect(batch: Batch) -> list[Said]:
    """Everything as `true_places` has it, in cells twice as fine."""
    said = []
    for index in range(2):
        shifts, _, shown_by = (torch.from_numpy(part) for part in true_places(batch, index, 16))
        shares = 50.0 * F.one_hot(shown_by.clamp(min=0), 3)
        fine = [torch.kron(part, torch.ones(1, 2, 2, 1)) for part in (shifts, shares)]
        colours = torch.zeros(5, 3, 32, 32)
        said.append(Said(fine[0], fine[0], colours, rearrange(fine[1], "f h w c -> f c h w"), colours))
    return said


def test_perfect_places_cost_nothing(batch: Batch):
    _, errors = place_loss(perfect(batch), batch, torch.zeros(2, 6, 3, 64, 64), torch.ones(10, 1, 16, 16))
    assert all(float(error) < 1e-6 for error in errors.values())


def test_errors_count_by_the_weights_of_their_cells(batch: Batch):
    wrong = [
        dataclasses.replace(said, head=said.head + 0.1 * torch.eye(32)[None, :, :, None]) for said in perfect(batch)
    ]
    corner = torch.ones(10, 1, 16, 16)
    corner[..., 8:, 8:] = 9.0
    even, uneven = (
        place_loss(wrong, batch, torch.zeros(2, 6, 3, 64, 64), weights)[1]["head_cells"]
        for weights in (torch.ones(10, 1, 16, 16), corner)
    )
    assert 0 < float(even) != pytest.approx(float(uneven), rel=1e-3)


def test_places_of_which_none_is_known_cost_nothing():
    places = torch.ones(1, 2, 4, 4)
    assert float(cells_off(places, torch.zeros(1, 4, 4, 2), torch.zeros(1, 4, 4))) == 0


def test_filmed_clips_are_learned_from_their_pictures_alone(build, batch: Batch):
    filmed = dataclasses.replace(batch, people=np.full(2, -1))
    metrics = build("mover", poses="extractor", expressions="encoder")(filmed, draws(0, 0, 0, 0), 0, 0, None).metrics
    assert "psnr_db" in metrics and "head_cells" not in metrics


def test_without_a_picture_loss_only_places_are_learned(build, batch: Batch):
    metrics = build("mover", picture_weight=0.0)(batch, draws(0, 0, 0, 0), 0, 0, None).metrics
    assert "head_cells" in metrics and "psnr_db" not in metrics


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
    recipe = changed(smoke(), {"model.pose_guider.mover_channels": []})
    networks = load_networks(networks_of("mover"), recipe.model, None, 0, True)
    with pytest.raises(BadConfig, match="leave it out"):
        build_phase("mover", recipe, networks, torch.device("cpu"))
