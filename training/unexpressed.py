"""Where a place on a drawn face lies when the face has another expression. Called by `training.places`.

Faces are painted flat (`training.face`), so an expression is a map of the painting's plane, column by column: lids,
lips and brows are lines, and what lies between two of them in one expression lies between them in the other.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.face import brow_lift, chin_drop, eye_centres, eye_lines, gaze_at, mouth_lines, mouth_shape
from training.identity import Identity
from training.motion import Motion

Map = NDArray[Any]
FADE = 0.12
"""Head units over which what a line does to the skin beside it ends."""
LIP_REACH = 1.35
"""Half mouths from its middle, where lips no longer pull."""
MIN_OPENING = 0.5
"""Of what a mouth shows inside, the share that the portrait must show as well to be looked up there."""


def unexpressed(identity: Identity, portrait: Motion, motion: Motion, local: Map) -> tuple[Map, Map]:
    """Places (n, 3) on a head with the expression of `motion`, as it has them with the portrait's; and (n,) whether
    that hides them: teeth and balls of eyes that show now. Only the painted front moves."""
    x, y = local[:, 0].astype(np.float64), local[:, 1].astype(np.float64)
    front = local[:, 2] < 0.05
    moved = np.stack((x, y - _chin_fall(portrait, motion, y)), 1)
    moved[:, 1] -= _brow_rise(identity, portrait, motion, x, y)
    moved, in_mouth = _through_mouth(identity, portrait, motion, x, y, moved)
    inside = in_mouth
    for side in (-1, 1):
        moved, in_eye = _through_eye(identity, portrait, motion, side, x, y, moved)
        inside = inside | in_eye
    places = local.copy()
    places[front, :2] = moved[front]
    return places, inside & front


def _chin_fall(portrait: Motion, motion: Motion, y: Map) -> Map:
    """How much lower the skin of the lower face lies."""
    return (chin_drop(motion) - chin_drop(portrait)) * np.clip((y - 0.4) / 0.45, 0, 1)


def _brow_rise(identity: Identity, portrait: Motion, motion: Motion, x: Map, y: Map) -> Map:
    """How much lower (positive) the skin around the brows lies."""
    near = np.exp(-(((y - identity.brow_y) / FADE) ** 2)) * np.clip((0.75 - np.abs(x)) / 0.15, 0, 1)
    return (brow_lift(portrait) - brow_lift(motion)) * near


def _through_mouth(identity: Identity, portrait: Motion, motion: Motion, x: Map, y: Map, moved: Map) -> tuple[Map, Map]:
    """Places between the lips' lines, as the portrait has them, and whether they are inside a mouth it keeps shut."""
    u = x / mouth_shape(identity, motion).half_width
    now, before = (mouth_lines(identity, one, np.clip(u, -1, 1)) for one in (motion, portrait))
    above, below = now[0] - FADE, now[3] + FADE
    fall = _chin_fall(portrait, motion, below)
    lines_now, lines_before = np.stack((above, *now, below)), np.stack((above, *before, below - fall))
    pulled = np.stack((u * mouth_shape(identity, portrait).half_width, _between(y, lines_now, lines_before)), 1)
    weight = np.clip((LIP_REACH - np.abs(u)) / (LIP_REACH - 1), 0, 1) * ((y > above) & (y < below))
    sideways = weight * np.clip(1 - np.maximum(now[0] - y, y - now[3]) / FADE, 0, 1)
    moved = moved + np.stack((sideways, weight), 1) * (pulled - np.stack((x, moved[:, 1]), 1))
    gap_now, gap_before = now[2] - now[1], before[2] - before[1]
    opened = (np.abs(u) < 1) & (y > now[1]) & (y < now[2]) & (gap_before < MIN_OPENING * gap_now)
    return moved, opened


def _through_eye(
    identity: Identity, portrait: Motion, motion: Motion, side: int, x: Map, y: Map, moved: Map
) -> tuple[Map, Map]:
    """Places around and in one eye, as the portrait has them, and whether the portrait's lids hide them."""
    centre, half = eye_centres(identity)[(side + 1) // 2], identity.eye_size
    u = (x - centre[0]) / half
    now, before = (eye_lines(identity, one, side, np.clip(u, -1, 1)) for one in (motion, portrait))
    outer = (now[0] - FADE, now[2] + FADE)
    lines_now, lines_before = (np.stack((outer[0], *lines, outer[1])) for lines in (now, before))
    within = (np.abs(u) < 1) & (y > outer[0]) & (y < outer[1])
    moved = np.where(within[:, None], np.stack((moved[:, 0], _between(y, lines_now, lines_before)), 1), moved)
    ball = (np.abs(u) < 1) & (y > now[1]) & (y < now[2])
    rolled = np.stack((x, y), 1) + gaze_at(identity, portrait) - gaze_at(identity, motion)
    upper, lower = eye_lines(identity, portrait, side, np.clip((rolled[:, 0] - centre[0]) / half, -1, 1))[1:]
    shown = (rolled[:, 1] > upper) & (rolled[:, 1] < lower) & (np.abs(rolled[:, 0] - centre[0]) < half)
    return np.where((ball & shown)[:, None], rolled, moved), ball & ~shown


def _between(y: Map, now: Map, before: Map) -> Map:
    """Heights (n,) between lines `now` (k, n), from top to bottom, as high between the lines `before`."""
    result = y.copy()
    for (top, bottom), (top_before, bottom_before) in zip(pairwise(now), pairwise(before), strict=True):
        share = (y - top) / np.maximum(bottom - top, 1e-6)
        here = (y >= top) & (y < bottom)
        result = np.where(here, top_before + share * (bottom_before - top_before), result)
    return result
