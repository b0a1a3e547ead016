from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from training.cutting import Limits, Reason, Seen, boxes_in_crop, bridged, crop_of, cut, share_inside, stretches
from training.faces import Window

HEIGHT, WIDTH = 300, 400
LIMITS = Limits(min_frames=8, max_frames=30, min_crop_px=50)


def head(x: float = 200, y: float = 150, size: float = 100) -> np.ndarray:
    """Parts (4, 4) of a head around x, y."""
    box = np.array((x - size / 2, y - size / 2, x + size / 2, y + size / 2))
    small = np.array((x - 10, y - 10, x + 10, y + 10))
    return np.stack([box, small, small, small]).astype(np.float32)


def seen(faces: list[np.ndarray | None], begins: tuple[int, ...] = (0,), fresh: Any = True) -> Seen:
    rows = np.stack([np.full((4, 4), np.nan, np.float32) if face is None else face for face in faces])
    starts = np.zeros(len(faces), bool)
    starts[list(begins)] = True
    return Seen(rows, starts, np.broadcast_to(fresh, len(faces)), np.tile((HEIGHT, WIDTH), (len(faces), 1)))


def bounds(cuts: Any) -> list[tuple[int, int]]:
    return [(c.start, c.stop) for c in cuts]


def reasons(rejected: Any) -> list[tuple[str, int, int]]:
    return [(str(r.reason), r.start, r.num_frames) for r in rejected]


def test_a_quiet_video_is_one_clip() -> None:
    cuts, rejected = cut(seen([head()] * 20), LIMITS)
    assert (bounds(cuts), rejected) == ([(0, 20)], [])
    assert cuts[0].crop == Window(130, 80, 140)


def test_a_video_is_cut_where_the_face_is_lost_and_where_the_scene_changes() -> None:
    cuts, rejected = cut(seen([head()] * 10 + [None] * 7 + [head()] * 21, begins=(0, 28)), LIMITS)
    assert bounds(cuts) == [(0, 10), (17, 28), (28, 38)]
    assert reasons(rejected) == [("face_lost", 10, 7)]


def test_long_stretches_become_equal_clips() -> None:
    cuts, _ = cut(seen([head()] * 70), LIMITS)
    assert bounds(cuts) == [(0, 23), (23, 47), (47, 70)]


def test_every_frame_is_in_a_clip_or_rejected() -> None:
    rng = np.random.default_rng(3)
    faces = [head() if rng.random() < 0.9 else None for _ in range(500)]
    begins = (0, *np.flatnonzero(rng.random(500) < 0.03).tolist())
    cuts, rejected = cut(seen(faces, begins), LIMITS)
    used = [frame for c in cuts for frame in range(c.start, c.stop)]
    unused = [frame for r in rejected for frame in range(r.start, r.start + r.num_frames)]
    assert sorted(used + unused) == list(range(500))


def test_a_short_loss_is_bridged_but_not_over_a_scene_change() -> None:
    found = seen([head(100), None, None, None, head(140)])
    middles = bridged(found.faces, found.begins)[:, 0, [0, 2]].mean(1)
    assert middles.tolist() == pytest.approx([100, 110, 120, 130, 140])
    over = seen([head(100), None, None, head(140)], begins=(0, 2))
    assert np.isnan(bridged(over.faces, over.begins)[1:3]).all()


def test_a_loss_between_two_different_faces_is_not_bridged() -> None:
    found = seen([head(100), None, head(300)])
    assert np.isnan(bridged(found.faces, found.begins)[1]).all()


def test_stretches_without_a_face_are_not_cut_at_scenes() -> None:
    has_face = np.array([False, False, False, True, True])
    assert stretches(has_face, np.array([True, True, False, False, True])) == [range(3), range(3, 4), range(4, 5)]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (seen([None] * 9), Reason.NO_FACE),
        (seen([head()] * 7), Reason.TOO_SHORT),
        (seen([head(size=30)] * 9), Reason.TOO_SMALL),
        (seen([head(x, size=90) for x in range(50, 350, 10)]), Reason.MOVES_TOO_FAR),
        (seen([head()] * 9, fresh=np.arange(9) % 3 == 0), Reason.LOW_RATE),
    ],
)
def test_what_no_clip_can_be_made_of_is_rejected_with_its_reason(found: Seen, reason: Reason) -> None:
    cuts, rejected = cut(found, LIMITS)
    assert (cuts, [r.reason for r in rejected]) == ([], [reason])
    assert sum(r.num_frames for r in rejected) == len(found.faces)


def test_many_short_scenes_are_told_of_once() -> None:
    _, rejected = cut(seen([head()] * 20, begins=(0, 3, 6, 9, 12, 15, 18)), LIMITS)
    assert reasons(rejected) == [("too_short", 0, 20)]


def test_nothing_seen_is_nothing_cut() -> None:
    empty = Seen(np.zeros((0, 4, 4), np.float32), np.zeros(0, bool), np.zeros(0, bool), np.zeros((0, 2), np.int64))
    assert cut(empty, LIMITS) == ([], [])


def test_the_crop_is_still_holds_a_moving_head_and_stays_in_the_picture() -> None:
    heads = np.stack([head(x, 60)[0] for x in (40, 60, 90, 120)])
    crop = crop_of(heads, HEIGHT, WIDTH)
    assert (crop.x, crop.y) == (0, 0)
    assert crop.side == pytest.approx(1.05 * 180, abs=5)
    assert (share_inside(heads, crop, HEIGHT, WIDTH) > 0.95).all()


def test_the_crop_is_never_larger_than_the_picture() -> None:
    crop = crop_of(head(200, 150, 290)[None, 0], HEIGHT, WIDTH)
    assert (crop.y, crop.side) == (0, HEIGHT)


def test_boxes_follow_the_crop_and_are_clipped_to_it() -> None:
    moved = boxes_in_crop(head(200, 150, 100)[None], Window(170, 100, 100), 60)
    assert moved.dtype == np.int32
    assert moved[0, 0].tolist() == [0, 0, 48, 60]
    assert moved[0, 1].tolist() == [12, 24, 24, 36]
