"""The network that moves the portrait: what it starts as, and what its answers mean in the picture."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from stages.config import HeadConfig
from stages.moved import moved, shifts
from stages.networks.blend import Blend
from stages.networks.expressions import NUM_TOLD
from stages.networks.light import MAX_BRIGHTENING
from stages.networks.mover import FINER, FIRST_SHARES, NUM_SAID, SPLIT, Said, composed, first_guess, meant

SIDE = 48


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def said(**parts: torch.Tensor) -> torch.Tensor:
    """(1, NUM_SAID, 12, 12): zero but for the given parts."""
    names = ("head", "beside", "paint", "shares", "tint", "more", "is_body")
    return torch.cat(
        [
            torch.ones(1, size, 12, 12) * parts.get(name, torch.zeros(1)).reshape(1, -1, 1, 1)
            for name, size in zip(names, SPLIT, strict=True)
        ],
        1,
    )


def even(guess: torch.Tensor) -> torch.Tensor:
    """Light in which nothing becomes brighter or darker."""
    return torch.zeros(len(guess), 3, *guess.shape[1:3])


def uncovered(guess: torch.Tensor) -> torch.Tensor:
    """No head anywhere."""
    return torch.zeros(guess.shape[:3])


def calm(guess: torch.Tensor, channels: torch.Tensor, body: tuple[float, float] = (0.0, 0.0)) -> Said:
    """What is meant where expressions do nothing and the body moves by `body`."""
    told, shift = torch.zeros(len(guess), NUM_TOLD, 8, 8), torch.tensor([body])
    return meant(guess, even(guess), channels, told, some(1, 9, 3), shift, uncovered(guess))


def shown(portrait: torch.Tensor, said: Said) -> torch.Tensor:
    """The picture where head and what is beside it are both looked up in all of the portrait."""
    return composed(portrait.expand(2, -1, -1, -1), said)


@torch.no_grad()
def test_a_mover_that_says_nothing_shows_nearly_the_turned_head(moving_stages):
    config, mover = moving_stages.config, moving_stages.denoise.pose_guider.mover
    portrait, start, end = torch.rand(3, SIDE, SIDE), some(1, 9, 3), some(2, 2, 9, 3)
    guess = shifts(start, end, SIDE // config.pose_guider.head.grid_px, config.pose_guider.head)
    ours = shown(portrait, calm(guess, torch.zeros(2, NUM_SAID, 12, 12)))
    turned = moved(portrait, start, end, config.pose_guider.head)
    assert (ours - turned).abs().mean() < 0.02
    assert torch.tensor(FIRST_SHARES).softmax(0)[0] > 0.97
    own, tokens = some(3, 5, 6), some(4, 2, 5, 6)
    looked = mover.look(portrait, start, own)
    assert mover(torch.rand(2, 3, SIDE, SIDE), portrait, start, end, own, tokens, looked).shape == ours.shape


def test_said_shifts_move_what_is_looked_up():
    portrait, guess = torch.rand(3, SIDE, SIDE), torch.zeros(1, 12, 12, 2)
    cell = 2 / SIDE
    shifted = said(head=torch.tensor([4 * cell, 0.0]).atanh(), shares=torch.tensor([30.0, 0.0, 0.0]))
    [ours] = shown(portrait, calm(guess, shifted))
    torch.testing.assert_close(ours[:, :, :-4], portrait[:, :, 4:], rtol=0, atol=1e-4)


def test_between_pixels_fine_detail_is_kept():
    portrait = (0.3 + 0.4 * (torch.arange(SIDE) % 4 < 2)).expand(3, SIDE, SIDE)
    half = said(head=torch.tensor([1 / SIDE, 0.0]).atanh(), shares=torch.tensor([30.0, 0.0, 0.0]))
    [ours] = shown(portrait, calm(torch.zeros(1, 12, 12, 2), half))
    averaged = (portrait + portrait.roll(-1, dims=2)) / 2
    inside = slice(4, -4)
    assert ours[..., inside].std() > 1.1 * averaged[..., inside].std()


def test_what_lies_beside_the_head_has_shifts_of_its_own():
    portrait, guess = torch.rand(3, SIDE, SIDE), torch.full((1, 12, 12, 2), 0.3)
    [still] = shown(portrait, calm(guess, said(shares=torch.tensor([0.0, 30.0, 0.0]))))
    torch.testing.assert_close(still, portrait, rtol=0, atol=1e-4)
    shifted = said(beside=torch.tensor([0.0, 2 * 2 / SIDE]).atanh(), shares=torch.tensor([0.0, 30.0, 0.0]))
    [lower] = shown(portrait, calm(guess, shifted))
    torch.testing.assert_close(lower[:, :-2], portrait[:, 2:], rtol=0, atol=1e-4)


def test_the_body_moves_as_one_where_it_is_and_the_backdrop_stays():
    portrait, guess, beside = torch.rand(3, SIDE, SIDE), torch.zeros(1, 12, 12, 2), torch.tensor([0.0, 30.0, 0.0])
    by = (0.0, 2 * 2 / SIDE)
    still, lower = (
        shown(portrait, calm(guess, said(shares=beside, is_body=torch.tensor([logit])), by))[0]
        for logit in (-30.0, 30.0)
    )
    torch.testing.assert_close(still, portrait, rtol=0, atol=1e-4)
    torch.testing.assert_close(lower[:, :-2], portrait[:, 2:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_how_the_body_moves_is_told_by_keypoints_alone_to_a_part_of_a_pixel(moving_stages):
    mover = copy.deepcopy(moving_stages.denoise.pose_guider.mover)
    torch.nn.init.normal_(mover.body_out.weight, std=0.02)
    start, end = some(1, 9, 3), some(1, 9, 3) + 0.05 * some(2, 2, 9, 3)
    exact = mover.body_shift(start, end)
    assert exact.shape == (2, 2) and 1e-4 < exact.abs().max() < 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mover.body_shift(start, end), exact)
    rounded = mover.bfloat16().body_shift(start, end)
    assert (rounded - exact).abs().max() < 0.1 * 2 / 256


def test_head_and_what_is_beside_it_are_looked_up_apart():
    head, behind = torch.rand(2, 3, SIDE, SIDE)
    guess = torch.zeros(1, 12, 12, 2)
    for all_share, expected in ((0, head), (1, behind)):
        shares = 30.0 * torch.nn.functional.one_hot(torch.tensor(all_share), 3)
        [ours] = composed(torch.stack([head, behind]), calm(guess, said(shares=shares)))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_an_outline_between_cells_is_sharper_than_a_cell():
    """The head's logits rise by 20 from one cell of four pixels to the next."""
    channels = said(shares=torch.tensor([0.0, 0.0, -50.0]))
    channels[:, sum(SPLIT[:3])] = 20 * (torch.arange(12) - 5.5)
    [ours] = composed(
        torch.stack([torch.ones(3, SIDE, SIDE), torch.zeros(3, SIDE, SIDE)]), calm(torch.zeros(1, 12, 12, 2), channels)
    )
    mixed = ((ours[0, 20] > 0.05) & (ours[0, 20] < 0.95)).sum()
    assert 0 < mixed < 3 and ours[0, 20, 0] < 0.01 and ours[0, 20, -1] > 0.99


@torch.no_grad()
def test_a_blend_that_has_learned_nothing_changes_nothing_and_another_moves_shares_between_layers():
    head, behind = torch.rand(2, 3, SIDE, SIDE)
    told = calm(torch.zeros(1, 12, 12, 2), said(shares=torch.tensor([2.0, 0.0, -50.0])))
    blend = Blend()
    without = composed(torch.stack([head, behind]), told)
    torch.testing.assert_close(composed(torch.stack([head, behind]), told, blend), without, rtol=0, atol=1e-3)
    blend.conv_out.bias[:4] = -60.0
    torch.testing.assert_close(composed(torch.stack([head, behind]), told, blend)[0], behind, rtol=0, atol=1e-3)


def test_paint_covers_everything_where_it_has_all_the_share():
    covering = said(paint=torch.tensor([9.0, 0.0, -9.0]), shares=torch.tensor([0.0, 0.0, 40.0]))
    [ours] = shown(torch.rand(3, SIDE, SIDE), calm(torch.zeros(1, 12, 12, 2), covering))
    torch.testing.assert_close(ours[:, 5, 5], torch.tensor([1.0, 0.5, 0.0]), rtol=0, atol=1e-3)


def test_tint_is_added_to_what_is_looked_up_and_stays_a_picture():
    portrait, guess = torch.full((3, SIDE, SIDE), 0.5), torch.zeros(1, 12, 12, 2)
    tinted = said(tint=torch.tensor([0.2, -0.3, 0.9]).atanh(), shares=torch.tensor([30.0, 0.0, 0.0]))
    [ours] = shown(portrait, calm(guess, tinted))
    torch.testing.assert_close(ours[:, 7, 9], torch.tensor([0.7, 0.2, 1.0]), rtol=0, atol=1e-4)


def test_a_guess_is_refined_by_finer_cells():
    guess = torch.zeros(1, 12, 12, 2)
    finer = calm(guess, torch.zeros(1, NUM_SAID, 12 * FINER, 12 * FINER))
    assert finer.head.shape == (1, 12 * FINER, 12 * FINER, 2)
    head = torch.zeros(1, NUM_SAID, 12 * FINER, 12 * FINER)
    head[:, 0, 5, 7] = 0.5
    assert (calm(guess, head).head[..., 0] != 0).sum() == 1


def test_an_expression_pulls_and_paints_what_its_part_of_the_portrait_becomes():
    start = torch.tensor([[-0.2, -0.2, 0.0], [0.2, -0.2, 0.0], [0.0, 0.4, 0.0]])
    told = torch.zeros(1, NUM_TOLD, 8, 8)
    told[:, 0], told[:, 2], told[:, 3] = 0.1, 40.0, 9.0
    guess = torch.zeros(1, 12, 12, 2)
    still, pulled = (
        meant(guess, even(guess), said(), part, start, torch.zeros(1, 2), uncovered(guess))
        for part in (torch.zeros_like(told), told)
    )
    moved_by = pulled.head - still.head
    assert moved_by[0, 6, 6, 0] > 0.02 and (moved_by[0, 0] == 0).all() and (moved_by[..., 1] == 0).all()
    [ours] = shown(torch.rand(3, SIDE, SIDE), pulled)
    torch.testing.assert_close(ours[0, 24, 24], torch.tensor(1.0), rtol=0, atol=1e-3)


@torch.no_grad()
def test_motion_tokens_change_the_picture_and_frames_do_not_see_each_other(moving_stages):
    mover = moving_stages.denoise.pose_guider.mover
    drawn, portrait = torch.rand(2, 3, SIDE, SIDE), torch.rand(3, SIDE, SIDE)
    start, end, own, tokens = some(1, 9, 3), some(2, 2, 9, 3), some(3, 5, 6), some(4, 2, 5, 6)
    looked = mover.look(portrait, start, own)
    both = mover(drawn, portrait, start, end, own, tokens, looked)
    alone = mover(drawn[1:], portrait, start, end[1:], own, tokens[1:], looked)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    assert (mover(drawn, portrait, start, end, own, tokens + 1, looked) - both).abs().max() > 1e-3


@torch.no_grad()
def test_what_has_been_seen_in_the_portrait_decides(moving_stages):
    mover = moving_stages.denoise.pose_guider.mover
    drawn, portrait = torch.rand(2, 3, SIDE, SIDE), torch.rand(3, SIDE, SIDE)
    start, end, own, tokens = some(1, 9, 3), some(2, 2, 9, 3), some(3, 5, 6), some(4, 2, 5, 6)
    looked = mover.look(portrait, start, own)
    seen = dataclasses.replace(looked, depths=torch.cat([looked.depths[:1], torch.ones_like(looked.depths[1:])]))
    once, other, deeper = (
        mover(drawn, portrait, start, end, own, tokens, part)
        for part in (
            seen,
            dataclasses.replace(seen, fields=2 * seen.fields),
            dataclasses.replace(seen, depths=1.5 * seen.depths),
        )
    )
    assert (other - once).abs().max() > 1e-4 and (deeper - once).abs().max() > 1e-4


def test_what_comes_to_face_the_light_is_brighter_and_the_network_says_by_how_much_more():
    portrait, guess = torch.full((3, SIDE, SIDE), 0.3), torch.zeros(1, 12, 12, 2)
    told, gain = torch.zeros(1, NUM_TOLD, 8, 8), torch.full((1, 3, 12, 12), 0.2)
    all_head = torch.tensor([30.0, 0.0, 0.0])
    for more, exponent in ((0.0, 0.2), (1.0, 0.4), (-1.0, 0.0), (1e30, MAX_BRIGHTENING)):
        channels = said(shares=all_head, more=torch.tensor([more]))
        meaning = meant(guess, gain, channels, told, some(1, 9, 3), torch.zeros(1, 2), uncovered(guess))
        [ours] = shown(portrait, meaning)
        torch.testing.assert_close(ours, (portrait * math.exp(exponent)).clamp(max=1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_what_a_portrait_does_not_show_turns_as_an_ellipsoid(moving_stages):
    head = moving_stages.config.pose_guider.head
    start, end, flat = some(1, 9, 3), some(2, 2, 9, 3), torch.zeros(24, 24)
    depths = torch.stack([flat, flat - 1, flat, flat, flat])
    guess, found = first_guess(depths, start, end, 12, head)
    assert not found.seen.any() and torch.equal(guess, shifts(start, end, 12, head))
    depths[1, 8:16, 8:16] = 1
    guess, found = first_guess(depths, start, end, 12, head)
    is_seen = found.seen > 0
    assert is_seen.any() and torch.equal(guess[is_seen], found.shift[is_seen])
    assert torch.equal(guess[~is_seen], shifts(start, end, 12, head)[~is_seen])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@torch.no_grad()
def test_senseless_keypoints_give_a_picture(moving_stages, value):
    mover = moving_stages.denoise.pose_guider.mover
    end = torch.full((1, 9, 3), value)
    drawn, own, tokens = torch.rand(1, 3, SIDE, SIDE), some(3, 5, 6), some(4, 1, 5, 6)
    portrait, start = torch.rand(3, SIDE, SIDE), some(1, 9, 3)
    looked = mover.look(portrait, start, own)
    picture = mover(drawn, portrait, start, end, own, tokens, looked)
    assert picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1


def test_the_head_of_a_config_is_the_one_that_turns():
    start, end = some(1, 9, 3), some(2, 1, 9, 3)
    near, far = (shifts(start, end, 12, HeadConfig(margin=margin)) for margin in (0.1, 0.9))
    assert not torch.equal(near, far)
