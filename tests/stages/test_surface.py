"""A head of known depth, turned: held against drawn people, whose places are exactly known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stages.config import HeadConfig
from stages.keypoints import rotation
from stages.moved import bounded, shifts
from stages.surface import covered, directions, splatted, turned
from training.identity import sample_identity
from training.motion import sample_motion, sample_portrait_motion
from training.places import HEAD, INSIDE, head_shape, sources
from training.world import project, true_pose

SIDE = 32
TOWARDS = torch.tensor([0.0, 0.0, -1.0]).expand(16, 16, 3)
"""A surface that faces the viewer."""


def places_off(seed: int) -> tuple[float, float, float]:
    """Mean distance in cells from the true place, of a head with its true depths and of an ellipsoid; and how many of
    the head's cells are seen."""
    rng, person = np.random.default_rng(seed), sample_identity(700 + seed)
    portrait, motion = sample_portrait_motion(rng), sample_motion(rng, 0.7)
    start, end = (torch.from_numpy(project(true_pose(person, one)))[0] for one in (portrait, motion))
    depth, is_head, facing = (torch.from_numpy(part) for part in head_shape(person, portrait, 2 * SIDE)[:3])
    ours = turned(depth - start.mean(0)[2], facing, is_head, start, end[None], SIDE)
    true, kinds, _ = (torch.from_numpy(part) for part in sources(person, portrait, motion, SIDE))
    seen = (ours.seen[0] > 0) & (kinds == HEAD)
    guesses = ours.shift[0], shifts(start, end[None], SIDE, HeadConfig())[0]
    off = [float((guess - true).norm(dim=-1)[seen].mean()) * SIDE / 2 for guess in guesses]
    return *off, float(seen.sum() / (kinds == HEAD).sum())


def test_true_depths_tell_true_places_of_what_the_portrait_shows():
    known, guessed, seen = np.mean([places_off(seed) for seed in range(8)], 0)
    assert known < 0.4 * guessed
    assert seen > 0.85


def surface() -> tuple[Tensor, Tensor, Tensor]:
    """A flat square at depth 0, and keypoints (K, 3) around it."""
    depth, is_head = torch.zeros(16, 16), torch.zeros(16, 16, dtype=torch.bool)
    is_head[4:12, 4:12] = True
    return depth, is_head, torch.tensor([[-0.4, -0.4, 0.0], [0.4, -0.4, 0.0], [0.0, 0.6, 0.3], [0.0, 0.2, -0.3]])


def test_with_its_own_keypoints_nothing_moves_and_all_of_the_head_is_seen():
    depth, is_head, start = surface()
    still = turned(depth, TOWARDS, is_head, start, start[None], 16)
    assert torch.equal(still.seen[0] > 0, is_head)
    assert still.shift.abs().max() < 1e-5
    torch.testing.assert_close(still.normals[:, :3], still.normals[:, 3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(still.normals[0, :3, 8, 8], torch.tensor([0.0, 0.0, -1.0]))


def test_a_head_that_moves_aside_is_seen_there():
    depth, is_head, start = surface()
    aside = turned(depth, TOWARDS, is_head, start, (start + torch.tensor([0.25, 0.0, 0.0]))[None], 16)
    assert torch.equal(aside.seen[0] > 0, is_head.roll(2, dims=1))
    torch.testing.assert_close(aside.shift[0, 8, 8], torch.tensor([-0.25, 0.0]), rtol=0, atol=1e-5)


def test_where_a_head_turns_its_surface_faces_aside():
    depth, is_head, start = surface()
    about_y = rotation(torch.tensor([[0.0, 30.0, 0.0]]))[0]
    end = (start - start.mean(0)) @ about_y + start.mean(0)
    normals = turned(depth, TOWARDS, is_head, start, end[None], 16).normals[0, :, 8, 8]
    torch.testing.assert_close(normals[:3], torch.tensor([0.0, 0.0, -1.0]))
    torch.testing.assert_close(normals[3:], -about_y[2], rtol=0, atol=1e-5)


def test_depths_learn_from_where_they_lead():
    depth, is_head, start = surface()
    end = (start - start.mean(0)) @ rotation(torch.tensor([[0.0, 30.0, 0.0]]))[0] + start.mean(0)
    turned(depth.requires_grad_(), TOWARDS, is_head, start, end[None], 16).shift.sum().backward()
    assert depth.grad is not None and (depth.grad[is_head] != 0).all() and (depth.grad[~is_head] == 0).all()


def test_a_head_that_comes_much_nearer_has_gaps_that_are_not_seen():
    depth, is_head, start = surface()
    near = start.mean(0) + 3 * (start - start.mean(0))
    shown = turned(depth, TOWARDS, is_head, start, near[None], 16)
    share = (shown.seen[0] > 0).float().mean()
    assert 0.05 < share < 0.3
    assert (shown.shift[shown.seen == 0] == 0).all()


def test_off_the_picture_or_without_a_head_nothing_is_seen():
    depth, is_head, start = surface()
    far = turned(depth, TOWARDS, is_head, start, (start + torch.tensor([9.0, 0.0, 0.0]))[None], 16)
    none = turned(depth, TOWARDS, torch.zeros_like(is_head), start, start[None], 16)
    senseless = turned(depth, TOWARDS, is_head, start, bounded(torch.full((1, 4, 3), float("nan"))), 16)
    for gone in (far, none):
        assert not gone.seen.any() and not gone.shift.any()
    assert all(part.isfinite().all() for part in (senseless.shift, senseless.seen, senseless.normals))


def outlines_off(seed: int) -> tuple[float, float, float]:
    """Shares of the true head that are covered wrongly: by its solid, by that as flat as a mask, and unmoved."""
    rng, person = np.random.default_rng(seed), sample_identity(700 + seed)
    portrait, motion = sample_portrait_motion(rng), sample_motion(rng, 0.7)
    start, end = (torch.from_numpy(project(true_pose(person, one)))[0] for one in (portrait, motion))
    depth, is_head, _, thickness = (torch.from_numpy(part) for part in head_shape(person, portrait, 2 * SIDE))
    depth, logits = depth - start.mean(0)[2], torch.where(is_head, 30.0, -30.0)
    kinds = torch.from_numpy(sources(person, portrait, motion, 2 * SIDE)[1])
    true = ((kinds == HEAD) | (kinds == INSIDE)).float()
    mean_depth = torch.full_like(depth, depth[is_head].mean().item())
    solid = covered(depth, thickness, logits, start, end[None], 2 * SIDE)[0]
    flat = covered(mean_depth, torch.full_like(depth, 0.02), logits, start, end[None], 2 * SIDE)[0]
    off = [(((cover > 0.5) != (true > 0)).sum() / true.sum()).item() for cover in (solid, flat, is_head.float())]
    return off[0], off[1], off[2]


def test_a_solid_head_covers_what_the_drawn_one_does_and_a_flat_one_does_not():
    solid, flat, unmoved = np.mean([outlines_off(seed) for seed in range(8)], 0)
    assert solid < 0.05
    assert solid < 0.4 * flat and solid < 0.3 * unmoved


def test_with_its_own_keypoints_a_head_covers_itself_and_aside_what_is_there():
    depth, is_head, start = surface()
    logits, ends = torch.where(is_head, 30.0, -30.0), torch.stack([start, start + torch.tensor([0.25, 0.0, 0.0])])
    still, aside = covered(depth, torch.full_like(depth, 0.4), logits, start, ends, 16)
    torch.testing.assert_close(still, is_head.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(aside, still.roll(2, dims=1), rtol=0, atol=1e-3)


def test_a_thicker_head_covers_more_when_it_turns():
    depth, is_head, start = surface()
    logits = torch.where(is_head, 30.0, -30.0)
    end = (start - start.mean(0)) @ rotation(torch.tensor([[0.0, 40.0, 0.0]]))[0] + start.mean(0)
    thin, thick = (covered(depth, torch.full_like(depth, by), logits, start, end[None], 16) for by in (0.1, 0.6))
    assert thick.sum() > 1.2 * thin.sum()


def test_covers_are_numbers_whatever_is_asked_for():
    depth, is_head, start = surface()
    nothing, logits = torch.full_like(depth, -30.0), torch.where(is_head, 30.0, -30.0)
    edge_on = (start - start.mean(0)) @ rotation(torch.tensor([[0.0, 90.0, 0.0]]))[0] + start.mean(0)
    assert covered(depth, depth, nothing, start, start[None], 16).max() < 1e-6
    for end in (edge_on, bounded(torch.full((4, 3), float("nan"))), torch.zeros(4, 3)):
        cover = covered(depth, depth + 0.3, logits, start, end[None], 16)
        assert cover.isfinite().all() and cover.min() >= 0 and cover.max() <= 1


def test_what_is_nearer_hides_what_is_behind():
    there = torch.tensor([[[-0.9, -0.9], [-0.8, -0.8], [-0.7, -0.9], [0.9, 0.9]]])
    told = torch.tensor([[[1.0], [3.0], [100.0], [7.0]]])
    mean = splatted(told, there, torch.tensor([[-0.20, -0.19, 0.5, 3.0]]), 4)
    assert mean[0, 0, 0, 0] == 2.0 and mean[0, 0, 3, 3] == 7.0
    assert (mean != 0).sum() == 2


def test_frames_do_not_see_each_other():
    depth, is_head, start = surface()
    ends = start + torch.tensor([[[0.1, 0.0, 0.0]], [[0.0, -0.3, 0.0]]])
    both, alone = turned(depth, TOWARDS, is_head, start, ends, 16), turned(depth, TOWARDS, is_head, start, ends[1:], 16)
    torch.testing.assert_close(both.shift[1:], alone.shift)
    torch.testing.assert_close(both.normals[1:], alone.normals)


def test_a_slope_faces_aside():
    slope = torch.linspace(-1, 1, 16).expand(16, 16) * 15 / 16
    faced = directions(slope)[8, 8]
    torch.testing.assert_close(faced, torch.tensor([1.0, 0.0, -1.0]) / 2**0.5, rtol=0, atol=1e-4)
