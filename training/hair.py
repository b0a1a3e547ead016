"""Hair: its volumes, where it leaves the face free, and its strands. Called by `training.world`."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from training.identity import Identity
from training.solids import Ellipsoid, Map, Surface

LOOSE = ("bob", "long")
"""Styles that fall over ears and neck."""
FRIZZY = ("afro", "curly")


def hair_solids(identity: Identity) -> tuple[list[Ellipsoid], list[Ellipsoid]]:
    """The volumes in front (over the head) and behind (under the neck), turning with the head."""
    if identity.hair_style == "bald":
        return [], []
    volume, crown = identity.hair_volume, identity.cranium
    tight = identity.hair_style in ("buzz", "bun", "ponytail")
    grow = 0.015 if identity.hair_style == "buzz" else 0.04 if tight else 0.045 + 0.6 * volume
    cap = Ellipsoid((0, -0.24, 0.2), (crown + grow, 0.84 + grow, 0.9 + grow))
    return [cap, *_tops(identity)], _backs(identity)


def _tops(identity: Identity) -> list[Ellipsoid]:
    v, p = identity.hair_volume, identity.parting
    sides = [-1.0, 1.0]
    if identity.hair_style == "short":
        return [Ellipsoid((0.25 * p, -0.78, -0.18), (0.62, 0.3 + v, 0.5), roll=-12 * p)]
    if identity.hair_style == "swept":
        lean = 1.0 if p > 0 else -1.0
        return [
            Ellipsoid((0.2 * lean, -0.82, -0.25), (0.66, 0.3 + v, 0.46), roll=16 * lean),
            Ellipsoid((0.5 * lean, -0.62, -0.2), (0.36, 0.3 + v, 0.45), roll=34 * lean),
        ]
    if identity.hair_style == "fringe":
        return [Ellipsoid((0, -0.6, -0.35), (0.7, 0.4 + 0.5 * v, 0.44))]
    if identity.hair_style == "bob":
        return [Ellipsoid((0.74 * s, 0.22, 0.12), (0.25 + 0.5 * v, 0.66, 0.45), roll=-6 * s) for s in sides]
    if identity.hair_style == "long":
        return [Ellipsoid((0.78 * s, 0.55, 0.18), (0.25 + 0.4 * v, 1.12, 0.36), roll=-5 * s) for s in sides]
    if identity.hair_style == "bun":
        return [Ellipsoid((0, -1.16, 0.3), (0.36 + v, 0.32 + v, 0.34 + v))]
    return _curls(identity) if identity.hair_style in FRIZZY else []


def _curls(identity: Identity) -> list[Ellipsoid]:
    rng = np.random.default_rng([identity.seed, 3])
    afro = identity.hair_style == "afro"
    reach, ball = (0.96, 0.28) if afro else (0.90, 0.19)
    directions = rng.normal(size=(26, 3)) * (1, 0.9, 0.8)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    directions[:, 1] = np.where(directions[:, 1] > 0.25, -directions[:, 1], directions[:, 1])
    centres = directions * (reach, reach * 0.95, reach) + (0, -0.25, 0.25)
    sizes = ball * rng.uniform(0.85, 1.2, 26) + 0.5 * identity.hair_volume
    return [Ellipsoid(tuple(c), (r, r, r)) for c, r in zip(centres, sizes, strict=True) if c[2] > -0.45 or c[1] < -0.75]


def _backs(identity: Identity) -> list[Ellipsoid]:
    if identity.hair_style == "bob":
        return [Ellipsoid((0, 0.15, 0.5), (0.92, 0.82, 0.5))]
    if identity.hair_style == "long":
        return [Ellipsoid((0, 0.45, 0.5), (0.98, 1.3, 0.42))]
    if identity.hair_style == "afro":
        return [Ellipsoid((0, -0.15, 0.45), (1.12, 0.95, 0.8))]
    if identity.hair_style == "ponytail":
        side = 1.0 if identity.parting > 0 else -1.0
        return [
            Ellipsoid((0.5 * side, 0.2, 0.95), (0.28, 0.95, 0.28), roll=-18 * side),
            Ellipsoid((0, -0.5, 1.05), (0.3, 0.3, 0.3)),
        ]
    return []


def hair_cover(identity: Identity, local: Map, seen: Surface, strand: Map, pixel: float) -> Map:
    """(h, w) 0 to 1: where the front volumes really carry hair, given each pixel's place on the head."""
    x, y, z = local[..., 0], local[..., 1], local[..., 2]
    low = -0.30 if identity.hair_style == "fringe" else identity.hairline
    wide = identity.face_width * (0.9 if identity.hair_style in LOOSE else 0.97)
    shifted = x + (0.12 * identity.parting * (y < 0.1) if identity.hair_style in ("swept", "long", "short") else 0.0)
    ragged = 0.16 if identity.hair_style in ("fringe", "short", "swept") else 0.08
    away = np.where(y < 0.42, (0.42 - y) / (0.42 - low), (y - 0.42) / 1.3)
    field = np.sqrt((np.abs(shifted) / wide) ** 3 + np.abs(away) ** 3) - 1 + ragged * (strand - 0.5) * (y < 0.2)
    open_face = np.where(z < 0.12, _edge(field / 1.6, pixel * 1.5), 1.0)
    cover = seen.coverage * open_face
    if identity.hair_style not in LOOSE:
        nape = 0.0 + 0.95 * np.clip(z - 0.02, 0, 1) + 0.1 * (strand - 0.5)
        cover = cover * _edge(nape - y, pixel * 2)
    return np.asarray(cover * (0.85 if identity.hair_style == "buzz" else 1.0), np.float32)


def strands(identity: Identity, local: Map) -> Map:
    """(h, w) about 0 to 1: light and dark strands running down from the crown; frizz for curly hair."""
    x, y, z = local[..., 0], local[..., 1], local[..., 2]
    if identity.hair_style in FRIZZY:
        columns, rows = (x + 0.6 * z) * 110, (y - 0.5 * z) * 110
    else:
        dx, dy = x - 0.45 * identity.parting, y + 1.12
        columns, rows = np.arctan2(dx, dy + 0.3 * z) * 130, np.hypot(dx, dy) * 40
    pattern = _pattern(identity.seed, identity.hair_style in FRIZZY)
    wrap = (columns % 256).astype(np.float32), (rows % 256).astype(np.float32)
    return cv2.remap(pattern, *wrap, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


@lru_cache(maxsize=64)
def _pattern(seed: int, frizzy: bool) -> Map:
    noise = np.random.default_rng([seed, 4]).random((256, 256)).astype(np.float32)
    tiled = np.tile(noise, (3, 3))
    fine = cv2.GaussianBlur(tiled, (0, 0), 3.0 if frizzy else 1.2, sigmaY=3.0 if frizzy else 22)[256:512, 256:512]
    broad = cv2.GaussianBlur(tiled, (0, 0), 9.0 if frizzy else 6.0, sigmaY=9.0 if frizzy else 60)[256:512, 256:512]
    mixed = _standard(fine) * 0.6 + _standard(broad) * 0.6
    return np.clip(0.5 + 0.17 * mixed, 0, 1).astype(np.float32)


def _standard(values: Map) -> Map:
    return np.asarray((values - values.mean()) / values.std(), np.float32)


def beard_cover(identity: Identity, local: Map, lips: tuple[float, float, float]) -> Map:
    """(h, w) 0 to 1: beard and moustache on the skin; `lips` is half width, top and bottom of the mouth."""
    x, y, z = np.abs(local[..., 0]), local[..., 1], local[..., 2]
    half, top, bottom = lips
    climb = np.clip((x - half * 0.9) / (0.66 - half * 0.9), 0, 1)
    start = (bottom + 0.055) * (1 - climb) - 0.05 * climb + 0.06 * np.sin(np.pi * climb)
    chin = np.clip((y - start) / (0.05 + 0.1 * climb), 0, 1) * np.clip((0.35 - z) / 0.1, 0, 1)
    fullness = 1.0 if identity.beard > 0.45 else 0.0
    along = np.clip(x / (1.12 * half), 0, 1)
    edge = top - 0.01 + 0.09 * along**2
    lip = np.clip((edge - y) / 0.02, 0, 1) * np.clip((y - edge + 0.105 - 0.06 * along) / 0.025, 0, 1)
    lip = lip * np.clip((half * 1.12 - x) / 0.03, 0, 1) * (z < 0)
    return np.asarray(np.maximum(chin * max(fullness, 0.45), lip * identity.moustache), np.float32)


def hair_direction(identity: Identity, local: Map, turn: NDArray[np.float64]) -> Map:
    """(h, w, 3) where strands run to, in view coordinates with z towards the viewer."""
    flow = local - np.array((0.45 * identity.parting, -1.12, 0.1), np.float32)
    seen = flow @ turn.T.astype(np.float32) * np.array((1, 1, -1), np.float32)
    return np.asarray(seen / np.maximum(np.linalg.norm(seen, axis=-1, keepdims=True), 1e-3), np.float32)


def _edge(field: Map, width: float) -> Map:
    return np.asarray(np.clip(field / width + 0.5, 0, 1), np.float32)
