"""Loss weights lie where the boxes are."""

from __future__ import annotations

import torch

from training.regions import box_mask, place_weights, region_weights

BOXES = torch.tensor([[[8, 4, 28, 30], [10, 8, 16, 12], [20, 8, 26, 12], [12, 20, 24, 26]]])
"""Face, eyes and mouth in a picture of 32 pixels."""


def test_a_cell_counts_when_its_middle_is_inside_the_box():
    mask = box_mask(torch.tensor([[[1, 0, 4, 2]]]), 8, 4)[0, 0]
    assert mask.nonzero().tolist() == [[0, 0], [0, 1]]


def test_the_face_weighs_more_and_its_parts_more_still():
    weights = region_weights(BOXES, 32, 32, 0.5, 2.0)[0, 0]
    assert weights.unique().tolist() == [1.0, 1.5, 3.5]
    assert weights[0, 0] == 1 and weights[16, 16] == 1.5 and weights[22, 16] == 3.5 and weights[10, 12] == 3.5


def test_empty_boxes_weigh_nothing_extra():
    assert region_weights(torch.zeros(1, 4, 4, dtype=torch.int32), 32, 8, 1.0, 1.0).unique().tolist() == [1.0]


def test_place_weights_peak_in_the_middle_of_each_box_and_fall_off():
    weights = place_weights(BOXES[:, 1:], 32)[0, 0]
    assert weights[22, 18] > 0.9 and weights[10, 13] > 0.9
    assert weights[31, 0] < 0.1 and weights.max() <= 1
