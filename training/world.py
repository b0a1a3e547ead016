"""A person of the synthetic world, drawn: identity and motion in, picture and exact pose out.

Called by `training.assets` and the training's data; by hand:
`python -m training.world sheet OUT.png`, `python -m training.world clip OUT.mp4 --seed 7`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.messages import Pixels, Pose
from training import face, hair
from training.identity import Colour, Identity, sample_identity
from training.motion import Motion, sample_clip, sample_motion, sample_portrait_motion
from training.solids import Ellipsoid, Map, Surface, monomials, rotation, surface

VIEWER = np.eye(3)


@dataclass(frozen=True)
class Scene:
    """One frame's geometry: pixel places in head units, relative to the middle of the head."""

    identity: Identity
    motion: Motion
    size: int
    pixel: float
    basis: Map
    turn: NDArray[np.float64]
    torso: NDArray[np.float64]
    """Where the neck meets the body."""

    def see(self, solids: list[Ellipsoid], turn: NDArray[np.float64], melt: float) -> Surface:
        return surface(solids, turn, self.basis, (self.size, self.size), self.pixel, melt)

    def view(self, seen: Surface) -> Map:
        """(h, w, 3) places of the seen pixels, z away from the viewer."""
        grid = self.basis[3:5].reshape(2, self.size, self.size)
        return np.stack((grid[0], grid[1], -seen.height), -1)

    def local(self, seen: Surface) -> Map:
        """The same in the head's own coordinates."""
        return np.asarray(self.view(seen) @ self.turn.astype(np.float32))


def render(identity: Identity, motion: Motion, size: int = 256, supersample: float = 1.0) -> Pixels:
    """The picture, uint8 (size, size, 3). Outlines are anti-aliased even without supersampling."""
    inner = round(size * supersample)
    scene = make_scene(identity, motion, inner)
    picture = backdrop(identity, inner).copy()
    front, back = hair.hair_solids(identity)
    if back:
        _draw_hair(picture, scene, scene.see(back, scene.turn, 0.05), None)
    head = scene.see(head_solids(identity, motion), scene.turn, 0.075)
    _draw_body(picture, scene, _shadow(scene, head))
    _draw_head(picture, scene, head)
    if front:
        _draw_hair(
            picture, scene, scene.see(front, scene.turn, 0.03 if identity.hair_style in hair.FRIZZY else 0.08), head
        )
    if identity.glasses:
        _draw_glasses(picture, scene)
    if inner != size:
        picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(np.clip(picture * 255 + 0.5, 0, 255), np.uint8)


def canonical_keypoints(identity: Identity) -> NDArray[np.float32]:
    """(21, 3) keypoints in head units before pose. 1 and 2 are the brows, 3 and 4 the mouth corners, 12 the nose tip,
    15 the chin, 20 the root of the nose: the drawn ones; the rest are eyes, ears, cheeks, lips, crown and jaw."""
    i = identity
    tip = i.eye_y + i.nose_length
    front = -0.66
    points = (
        (0.0, 0.05, 0.0), (-0.40, -0.38, front + 0.06), (0.40, -0.38, front + 0.06),
        (-i.mouth_width, i.mouth_y, front + 0.03), (i.mouth_width, i.mouth_y, front + 0.03),
        (-i.eye_spacing, i.eye_y, front), (i.eye_spacing, i.eye_y, front),
        (-i.face_width, 0.02, 0.05), (i.face_width, 0.02, 0.05), (-0.45, 0.25, front + 0.1), (0.45, 0.25, front + 0.1),
        (0.0, i.mouth_y - i.lip, front - 0.06), (0.0, tip, -0.72 - i.nose_depth),
        (0.0, i.mouth_y + i.lip, front - 0.05),
        (0.0, -1.05, 0.15), (0.0, 0.97, -0.45), (-i.jaw_width, 0.65, -0.1), (i.jaw_width, 0.65, -0.1),
        (-i.eye_spacing, i.brow_y, front), (i.eye_spacing, i.brow_y, front), (0.0, i.eye_y - 0.12, front - 0.03),
    )  # fmt: skip
    return np.array(points, np.float32)


def true_pose(identity: Identity, motion: Motion) -> Pose:
    """What a perfect keypoint extractor says of the picture (method: section 6.2), n = 1."""
    return Pose(
        canonical=canonical_keypoints(identity)[None],
        degrees=np.array([[motion.pitch, motion.yaw, motion.roll]], np.float32),
        translation=np.array([[motion.x, motion.y, 0.0]], np.float32),
        scale=np.array([[motion.scale]], np.float32),
    )


def project(pose: Pose) -> NDArray[np.float32]:
    """(n, K, 3) keypoints in the picture, [-1, 1] across (get_kp of section 6.2)."""
    turns = np.stack([rotation(*row) for row in pose.degrees.astype(np.float64)])
    points = np.einsum("nkj,nij->nki", pose.canonical, turns) * pose.scale[:, None]
    points[..., :2] += pose.translation[:, None, :2]
    return np.asarray(points, np.float32)


def head_solids(identity: Identity, motion: Motion) -> list[Ellipsoid]:
    """The head without hair."""
    i, drop = identity, face.chin_drop(motion)
    tip, bulge, lift = i.eye_y + i.nose_length, i.nose_depth, 0.05 * max(motion.smile, 0)
    solids = [
        Ellipsoid((0, -0.22, 0.2), (i.cranium, 0.82, 0.88)),
        Ellipsoid((0, 0.08, -0.02), (i.face_width, 0.76, 0.68)),
        Ellipsoid((0, 0.44 + 0.7 * drop, 0.0), (i.jaw_width, 0.5 + 0.3 * drop, 0.58)),
        Ellipsoid((0, 0.70 + drop, -0.18), (0.26 + i.chin, 0.24, 0.33)),
        Ellipsoid((0, i.mouth_y + 0.4 * drop, -0.22), (0.38, 0.32 + 0.5 * drop, 0.43)),
        Ellipsoid((0, -0.24, -0.30), (0.56, 0.2, 0.34)),
        Ellipsoid((0, tip - 0.55 * i.nose_length, -0.60), (0.085, 0.62 * i.nose_length, 0.1 + 0.3 * bulge), pitch=-18),
        Ellipsoid((0, tip, -0.64 - 0.6 * bulge), (i.nose_width * 0.62, i.nose_width * 0.55, 0.1 + 0.3 * bulge)),
    ]
    for side in (-1, 1):
        solids += [
            Ellipsoid((side * 0.34, 0.18 - lift, -0.10 - 0.5 * i.cheek), (0.36, 0.34, 0.47)),
            Ellipsoid((side * i.nose_width * 0.62, tip + 0.025, -0.63), (i.nose_width * 0.42, 0.055, 0.1)),
            Ellipsoid((side * (i.face_width + 0.05), 0.03, 0.12), (0.08, i.ear * 1.15, 0.8 * i.ear), roll=10 * side),
        ]
    if i.beard > 0.6:
        grown = 0.03 + 0.12 * (i.beard - 0.6)
        solids.append(
            Ellipsoid((0, 0.54 + 0.8 * drop, -0.04), (i.jaw_width - 0.02 + grown, 0.46 + grown, 0.55 + grown))
        )
    return solids


def make_scene(identity: Identity, motion: Motion, size: int) -> Scene:
    """The geometry of a picture of size x size pixels."""
    place = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1) / motion.scale
    x, y = motion.x / motion.scale, motion.y / motion.scale
    torso = np.array((-0.45 * x - 0.006 * motion.roll, 1.13 - 0.35 * y))
    turn = rotation(motion.pitch, motion.yaw, motion.roll)
    basis = monomials(place - np.float32(x), place - np.float32(y))
    return Scene(identity, motion, size, 2 / (size * motion.scale), basis, turn, torso)


def shade(identity: Identity, albedo: Map, normal: Map, gloss: float) -> Map:
    """Light on surface points, both (n, 3): wrapped diffuse, warm shadows, rim, a soft highlight, inked outlines."""
    light = np.array(identity.light, np.float32)
    lit = np.clip((normal @ light + 0.35) / 1.35, 0, 1)
    if identity.cel:
        lit = lit * (1 - identity.cel) + identity.cel * (0.25 + 0.65 * np.clip((lit - 0.42) * 9 + 0.5, 0, 1))
    ambient = identity.ambient * (0.9 - 0.22 * normal[:, 1])
    tone = ambient + np.float32(1.12 - 0.75 * identity.ambient) * lit
    away = 1 - lit
    half = light + np.array((0, 0, 1), np.float32)
    spark = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 2
    spark = (spark * spark * spark) ** 2
    behind = np.clip(-0.3 - normal @ (light * np.array((1, 1, -0.6), np.float32)), 0, 1)
    rim = identity.rim * np.clip(1 - normal[:, 2], 0, 1) ** 3 * behind
    edge = 1 - identity.ink * np.clip((0.42 - normal[:, 2]) / 0.25, 0, 1)
    warmth = 1 - away[:, None] * np.array((0.0, 0.085, 0.12), np.float32)
    return np.asarray(
        (albedo * tone[:, None] * warmth + (gloss * spark * spark + rim)[:, None]) * edge[:, None], np.float32
    )


def _paint(
    picture: Map,
    identity: Identity,
    cover: Map,
    albedo: Map,
    normal: Map,
    gloss: float = 0.0,
    extra: Map | float = 0.0,
    dim: Map | float = 1.0,
) -> None:
    """Shades what `cover` shows and lays it over the picture; `extra` is added light, `dim` multiplies."""
    seen = np.nonzero(cover > 0.004)
    light, dark = (m[seen][:, None] if isinstance(m, np.ndarray) else m for m in (extra, dim))
    colour = np.clip((shade(identity, albedo[seen], normal[seen], gloss) + light) * dark, 0, 1)
    picture[seen] += cover[seen][:, None] * (colour - picture[seen])


def _flat(colour: Colour, shape: tuple[int, ...]) -> Map:
    return np.broadcast_to(np.array(colour, np.float32), (*shape[:2], 3))


def _shadow(scene: Scene, head: Surface) -> Map:
    """What the head keeps from the light on neck and shoulders, (h, w) 0 to 1."""
    unit = 1 / scene.pixel
    shift = np.array(((1, 0, -0.16 * scene.identity.light[0] * unit), (0, 1, 0.2 * unit)))
    moved = cv2.warpAffine(head.coverage, shift, (scene.size, scene.size))
    return np.asarray(cv2.blur(moved, (round(0.16 * unit) | 1, round(0.16 * unit) | 1)), np.float32)


def _draw_body(picture: Map, scene: Scene, shadow: Map) -> None:
    identity, (tx, ty) = scene.identity, scene.torso
    seen = scene.see([neck(scene)], VIEWER, 0)
    place = scene.view(seen)[..., :2] - (tx, ty)
    rolled = identity.neckline == "turtleneck"
    skin = np.where(
        (place[..., 1:] > -0.2) & rolled, np.array(identity.trim, np.float32), np.array(identity.skin, np.float32)
    )
    dark = 1 - 0.42 * shadow
    _paint(picture, identity, seen.coverage, skin, seen.normal, 0.02, dim=dark)
    body = scene.see(body_solids(identity, tx, ty), VIEWER, 0.12)
    albedo, cover = _clothes(identity, scene.view(body)[..., :2] - (tx, ty), scene.pixel)
    chest = body.coverage * (1 - cover) * (place[..., 1] > 0.02)
    _paint(picture, identity, chest, _flat(identity.skin, cover.shape), body.normal, 0.02, dim=dark)
    _paint(picture, identity, body.coverage * cover, albedo, body.normal, dim=1 - 0.3 * shadow)


def neck(scene: Scene) -> Ellipsoid:
    """From the nape, which turns with the head, to the body."""
    nape = scene.turn @ np.array((0.0, 0.4, 0.2))
    foot = np.array((scene.torso[0], scene.torso[1] + 0.25, 0.3))
    axis = foot - nape
    wide, lean = scene.identity.neck, -np.degrees(np.arctan2(axis[0], axis[1]))
    return Ellipsoid(tuple((nape + foot) / 2), (wide, 1.0 * float(np.linalg.norm(axis)), wide), roll=lean)


def body_solids(identity: Identity, tx: float, ty: float) -> list[Ellipsoid]:
    """Shoulders, chest and hood below the foot of the neck, which lies at (tx, ty)."""
    wide = identity.shoulders
    solids = [
        Ellipsoid((tx, ty + 1.35, 0.4), (wide * 0.82, 1.2, 0.65)),
        Ellipsoid((tx, ty + 0.4, 0.4), (0.72, 0.36, 0.42)),
    ]
    for side in (-1, 1):
        solids.append(Ellipsoid((tx + side * wide * 0.62, ty + 0.85, 0.4), (wide * 0.48, 0.5, 0.5), roll=24 * side))
    if identity.neckline == "hood":
        solids += [Ellipsoid((tx + side * 0.46, ty + 0.24, 0.35), (0.3, 0.2, 0.4), roll=-28 * side) for side in (-1, 1)]
    return solids


def _clothes(identity: Identity, place: Map, pixel: float) -> tuple[Map, Map]:
    """(h, w, 3) cloth colours and (h, w) where cloth is, from places relative to the foot of the neck."""
    x, y = np.abs(place[..., 0]), place[..., 1]
    field = {
        "round": np.hypot(x / 0.56, (y - 0.0) / 0.42) - 1,
        "vee": (y - 0.78 + 1.75 * x) / 1.6,
        "shirt": (y - 0.62 + 1.7 * x) / 1.6,
        "turtleneck": np.hypot(x / 0.5, y / 0.2) - 1,
        "hood": np.hypot(x / 0.46, y / 0.42) - 1,
    }[identity.neckline]
    cover = np.clip(field / (pixel * 2.2) + 0.5, 0, 1)
    albedo = _flat(identity.cloth, x.shape)
    if identity.stripes:
        band = np.clip(np.sin(y * identity.stripes * 3.1) * 4, -1, 1)[..., None] * 0.5 + 0.5
        albedo = albedo * band + np.array(identity.trim, np.float32) * (1 - band)
    trimmed = np.clip((0.13 - field) / (pixel * 2.2) + 0.5, 0, 1)
    if identity.neckline == "shirt":
        trimmed = np.clip(np.minimum(0.30 - field, 0.46 - y + 0.1 * x) / (pixel * 2.2) + 0.5, 0, 1)
        seam = np.clip((0.025 - x) / pixel, 0, 1) * (y > 0.5)
        albedo = albedo * (1 - 0.3 * seam[..., None])
    if identity.neckline != "vee" or identity.stripes == 0:
        albedo = albedo + trimmed[..., None] * (np.array(identity.trim, np.float32) - albedo)
    folds = 0.06 * np.sin(6 * x + 3 * y + identity.seed) * np.clip(y, 0, 1)
    return np.asarray(albedo * (1 + folds[..., None]), np.float32), np.asarray(cover, np.float32)


def _draw_head(picture: Map, scene: Scene, head: Surface) -> None:
    identity, motion = scene.identity, scene.motion
    local = scene.local(head)
    albedo = np.broadcast_to(np.array(identity.skin, np.float32), local.shape).copy()
    ear = np.clip((np.abs(local[..., 0]) - identity.face_width + 0.02) / 0.03, 0, 1) * (np.abs(local[..., 1]) < 0.3)
    albedo *= 1 - ear[..., None] * np.array((0.04, 0.12, 0.12), np.float32)
    if identity.beard:
        lips = face.mouth_shape(identity, motion)
        grown = hair.beard_cover(
            identity, local, (max(lips.half_width, 0.85 * identity.mouth_width), lips.upper_out, lips.lower_out)
        )
        strand = hair.strands(identity, local)
        colour = np.array(identity.hair, np.float32) * (0.62 + 0.6 * strand[..., None])
        albedo += (grown * 0.93)[..., None] * (colour - albedo)
    painted = _painted(scene, local)
    alpha = painted[..., 3] / 255 * (local[..., 2] < 0.05)
    albedo += alpha[..., None] * (painted[..., :3] / 255 - albedo)
    _paint(picture, identity, head.coverage, albedo, head.normal, 0.10)
    if identity.earrings:
        _draw_earrings(picture, scene)


def _painted(scene: Scene, local: Map) -> Map:
    texture = face.paint_face(scene.identity, scene.motion, round(1.25 * face.SPAN / scene.pixel))
    per_unit = len(texture) / face.SPAN
    columns = (local[..., 0] - face.LEFT) * per_unit - 0.5
    rows = (local[..., 1] - face.TOP) * per_unit - 0.5
    sampled = cv2.remap(texture, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR)
    return sampled.astype(np.float32)


def _draw_hair(picture: Map, scene: Scene, seen: Surface, head: Surface | None) -> None:
    """Hair over `head`, or, where that is None, behind everything."""
    identity, local = scene.identity, scene.local(seen)
    strand = hair.strands(identity, local)
    cover = seen.coverage
    if head is not None:
        cover = hair.hair_cover(identity, local, seen, strand, scene.pixel)
        above = np.where(head.coverage > 0.02, (seen.height - head.height) / 0.03 + 0.5, 1.0)
        cover = cover * np.clip(above, 0, 1)
    deep = 1.0 if head is not None else 0.62
    albedo = np.array(identity.hair, np.float32) * (deep * (0.62 + 0.72 * strand[..., None]))
    _paint(picture, identity, cover, albedo, seen.normal, extra=_sheen(scene, seen, local, strand) * np.float32(deep))


def _sheen(scene: Scene, seen: Surface, local: Map, strand: Map) -> Map:
    """The bright band across strands."""
    identity = scene.identity
    if identity.hair_style in hair.FRIZZY:
        return np.zeros_like(strand)
    flow = hair.hair_direction(identity, local, scene.turn)
    flow = flow - seen.normal * (flow * seen.normal).sum(-1, keepdims=True)
    half = np.array(identity.light, np.float32) + np.array((0, -0.15, 1), np.float32)
    along = (flow @ (half / np.linalg.norm(half))) / np.maximum(np.linalg.norm(flow, axis=-1), 1e-3)
    band = np.clip(1 - along * along, 0, 1) ** 14
    return np.asarray(band * (0.05 + 0.22 * strand) * (0.4 + 0.6 * max(identity.hair)), np.float32)


def _to_pixels(scene: Scene, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points of the head (n, 3) to picture coordinates (n, 2) in pixels, and their depth."""
    seen = points @ scene.turn.T
    middle = np.array((scene.motion.x, scene.motion.y))
    return ((seen[:, :2] * scene.motion.scale + middle) * 0.5 + 0.5) * scene.size - 0.5, seen[:, 2]


def _stroke(picture: Map, points: NDArray[np.float64], width: float, colour: Colour, opacity: float = 1.0) -> None:
    """An open line of `width` pixels (a float: drawn four times finer)."""
    low = np.floor(points.min(0) - width - 2).astype(int).clip(0, len(picture))
    high = np.ceil(points.max(0) + width + 3).astype(int).clip(0, len(picture))
    if (high - low).min() < 1:
        return
    mask = np.zeros((*((high - low)[::-1] * 4),), np.uint8)
    line = np.round(((points - low + 0.5) * 4 - 0.5) * 32).astype(np.int32)
    cv2.polylines(mask, [line], False, 255, max(round(width * 4), 1), cv2.LINE_AA, 5)
    alpha = cv2.resize(mask, tuple(int(v) for v in high - low), interpolation=cv2.INTER_AREA).astype(np.float32)
    block = picture[low[1] : high[1], low[0] : high[0]]
    block += (alpha * (opacity / 255))[..., None] * (np.array(colour, np.float32) - block)


def _draw_glasses(picture: Map, scene: Scene) -> None:
    identity = scene.identity
    angle = np.linspace(0, 2 * np.pi, 41)
    power = 1 - 0.55 * (1 - identity.glasses)
    rim = np.stack([np.sign(f(angle)) * np.abs(f(angle)) ** power for f in (np.cos, np.sin)], 1)
    width = 0.036 / scene.pixel
    for side in (-1, 1):
        ring = np.column_stack(
            (
                side * identity.eye_spacing + 0.245 * rim[:, 0],
                identity.eye_y + 0.03 + 0.2 * rim[:, 1],
                np.full(41, -0.74),
            )
        )
        ring[:, 2] += 0.25 * (np.abs(ring[:, 0]) / 0.6) ** 2
        _stroke(picture, _to_pixels(scene, ring)[0], width, identity.glasses_colour)
        temple = np.array(
            ((side * 0.6, -0.06, -0.45), (side * 0.8, -0.05, -0.1), (side * (identity.face_width + 0.07), -0.04, 0.1))
        )
        if side * scene.motion.yaw > -14:
            _stroke(picture, _to_pixels(scene, temple)[0], width * 0.8, identity.glasses_colour, 0.9)
    bridge = np.array(((-0.1, -0.05, -0.76), (0.0, -0.075, -0.8), (0.1, -0.05, -0.76))) + np.array(
        (0, identity.eye_y + 0.05, 0)
    )
    _stroke(picture, _to_pixels(scene, bridge)[0], width, identity.glasses_colour)


def _draw_earrings(picture: Map, scene: Scene) -> None:
    for side in (-1, 1):
        spot = np.array(((side * (scene.identity.face_width + 0.07), 0.28, 0.06),) * 2)
        place, depth = _to_pixels(scene, spot)
        if depth[0] < 0.25:
            _stroke(picture, place + np.array(((0, 0), (0, 0.01))), 0.11 / scene.pixel, scene.identity.trim)


@lru_cache(maxsize=8)
def backdrop(identity: Identity, size: int) -> Map:
    """The static background, (size, size, 3) in [0, 1]."""
    rng = np.random.default_rng([identity.seed, 5])
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    lean = rng.uniform(-0.5, 0.5)
    mix = np.clip(ramp[:, None] + lean * (ramp[None] - 0.5), 0, 1)[..., None]
    small = np.array(identity.back_top, np.float32) * (1 - mix) + np.array(identity.back_bottom, np.float32) * mix
    large = cv2.resize(small.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    layer = _props(identity.backdrop, rng, large.copy())
    soft = size * rng.uniform(0.008, 0.03)
    return np.clip(cv2.GaussianBlur(layer, (0, 0), soft), 0, 1)


def _props(kind: str, rng: np.random.Generator, layer: Map) -> Map:
    size = len(layer)
    for _ in range({"gradient": 0, "bokeh": 14, "panels": 5, "wall": 9}[kind]):
        x, y = (int(v) for v in rng.uniform(0, size, 2))
        tint = np.clip(layer[y, x] * rng.uniform(0.7, 1.3) + rng.normal(0, 0.06, 3), 0, 1)
        colour = tuple(float(v) for v in tint)
        extent = int(size * rng.uniform(0.03, 0.12))
        if kind == "bokeh":
            cv2.circle(layer, (x, y), extent, colour, -1, cv2.LINE_AA)
        elif kind == "panels":
            cv2.rectangle(layer, (x - extent, 0), (x + extent, size), colour, -1)
        else:
            cv2.rectangle(layer, (x - extent, y - extent), (x + extent, y + extent // 2), colour, -1)
    return layer


def contact_sheet(seeds: list[int], num_columns: int, size: int, supersample: float) -> Pixels:
    """A row per person: the portrait, then other motions."""
    rows = []
    for seed in seeds:
        identity, rng = sample_identity(seed), np.random.default_rng([seed, 6])
        motions = [sample_portrait_motion(rng)] + [sample_motion(rng) for _ in range(num_columns - 1)]
        rows.append(np.concatenate([render(identity, motion, size, supersample) for motion in motions], 1))
    return np.concatenate(rows, 0)


def feature_boxes(identity: Identity, motion: Motion, size: int) -> dict[str, NDArray[np.int32]]:
    """Boxes (4,) int32 x1, y1, x2, y2 of `face`, `left_eye`, `right_eye` and `mouth` in the picture, clamped to it."""
    points = project(true_pose(identity, motion))[0, :, :2]
    unit = motion.scale
    parts: dict[str, tuple[NDArray[np.floating], float]] = {
        "face": (points, 0.1),
        "left_eye": (points[[5, 5]] + np.array(((-0.2, -0.12), (0.2, 0.12))) * unit, 0.0),
        "right_eye": (points[[6, 6]] + np.array(((-0.2, -0.12), (0.2, 0.12))) * unit, 0.0),
        "mouth": (points[[3, 4, 11, 13]] + np.array((0, 0.15 * motion.jaw)) * unit, 0.06 * unit),
    }
    return {name: _box(part, margin, size) for name, (part, margin) in parts.items()}


def _box(points: NDArray[np.floating], margin: float, size: int) -> NDArray[np.int32]:
    corners = np.concatenate([points.min(0) - margin, points.max(0) + margin])
    return np.asarray(np.clip(np.round((corners + 1) / 2 * size), 0, size), np.int32)


def write_clip(
    path: Path,
    frames: list[Pixels],
    fps: int = 25,
    quality: int = 23,
    pixel_format: str = "yuv420p",
    keyframe_every: int = 250,
    preset: str = "slow",
) -> None:
    """H.264 video of uint8 (h, w, 3) frames; a lower `quality` number is a better picture."""
    import av

    options = {"crf": str(quality), "preset": preset, "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options | {"g": str(keyframe_every)})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.world", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sheet", "clip"), help="a contact sheet of people, or a talking head as mp4")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="first identity")
    parser.add_argument("--rows", type=int, default=6, help="people on the sheet")
    parser.add_argument("--columns", type=int, default=7, help="motions per person")
    parser.add_argument("--size", type=int, default=256, help="side of a picture in pixels")
    parser.add_argument("--supersample", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the clip")
    args = parser.parse_args()
    if args.what == "sheet":
        sheet = contact_sheet(list(range(args.seed, args.seed + args.rows)), args.columns, args.size, args.supersample)
        cv2.imwrite(str(args.out), sheet[..., ::-1])
        return
    motions = sample_clip(np.random.default_rng([args.seed, 7]), round(args.seconds * 25))
    identity = sample_identity(args.seed)
    write_clip(args.out, [render(identity, motion, args.size, args.supersample) for motion in motions])


if __name__ == "__main__":
    main()
