"""Places from heat, to a part of a cell."""

import pytest
import torch

from stages.networks.pinpoint import Pinpoint, places_of


def test_a_single_hot_cell_is_where_the_keypoint_is():
    heat = torch.zeros(1, 2, 4, 8)
    heat[0, 0, 1, 6] = heat[0, 1, 3, 0] = 50.0
    places, spreads = places_of(heat)
    torch.testing.assert_close(places[0], torch.tensor([[0.625, -0.25], [-0.875, 0.75]]))
    assert spreads.max() < 2e-3


def test_between_two_cells_the_place_is_a_part_of_a_cell_and_less_sure():
    heat = torch.zeros(1, 1, 4, 4)
    heat[0, 0, 2, 1] = 50.0
    heat[0, 0, 2, 2] = 50.0 + torch.tensor(3.0).log()
    places, spreads = places_of(heat)
    torch.testing.assert_close(places[0, 0], torch.tensor([0.125, 0.25]))
    assert float(spreads) == pytest.approx(0.5 * (0.75 * 0.25) ** 0.5, abs=1e-4)


@torch.no_grad()
def test_a_face_elsewhere_and_larger_has_the_same_shape():
    torch.manual_seed(0)
    pinpoint = Pinpoint((6, 10), 4, 3)
    pinpoint.read[-1].weight.normal_()
    pinpoint.read[0].weight[:, 9:12] = 0
    heat = torch.full((2, 3, 8, 8), -50.0)
    for keypoint, (x, y) in enumerate(((1, 1), (2, 1), (1, 3))):
        heat[0, keypoint, y, x] = heat[1, keypoint, 2 * y, 1 + 2 * x] = 50.0
    small, large = pinpoint(torch.zeros(2, 10), heat)
    torch.testing.assert_close(small, large, rtol=1e-2, atol=1e-2)
    heat[1, 2] = heat[1, 1]
    assert (pinpoint(torch.zeros(2, 10), heat)[1] - small).abs().max() > 0.1


def test_gradients_are_finite_where_all_keypoints_are_in_one_place():
    pinpoint = Pinpoint((6, 10), 4, 3)
    torch.nn.init.ones_(pinpoint.read[-1].weight)
    heat = torch.full((1, 3, 4, 4), -1.0)
    heat[..., 1, 2] = 9.0
    heat.requires_grad_()
    pinpoint(torch.zeros(1, 10), heat).sum().backward()
    assert heat.grad is not None and heat.grad.isfinite().all()
