"""Where everything in a drawn picture is: the exact answers to what `stages.networks.mover` and its parts have to say.

Called by phase `mover`. Pictures are seen in g x g cells; places are [-1, 1] across the picture, x right, y down.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import hair
from training.identity import Identity
from training.motion import Motion
from training.solids import Surface, rotation
from training.unexpressed import unexpressed
from training.world import VIEWER, Scene, body_solids, head_solids, make_scene, neck, shade

BACKDROP, BODY, NECK, HEAD, INSIDE = range(5)
"""What a cell shows. A neck follows both its ends, so nobody says where it is from; INSIDE a mouth or an eye is what
the portrait's expression hides."""
TOWARDS = np.array((1, 1, -1), np.float32)
"""From the drawn world's normals to those of `stages.surface`, whose z points away from the viewer."""
MIRROR = np.diag((1.0, 1.0, -1.0))
"""From a scene to what is seen of it from behind."""
MIDDLING, DARKEST = 0.5, 0.02
"""A surface's colour, and the least light on it, by which brightness is told."""
Map = NDArray[Any]


def sources(identity: Identity, portrait: Motion, motion: Motion, side: int) -> tuple[Map, Map, Map]:
    """How far from each cell of the picture with `motion` lies the place in the portrait that it shows, (g, g, 2); what
    it shows, (g, g) of the constants above; and of the head how deep that place lies there, (g, g) as in `head_shape`.
    Places of the head are those of its surface, also where it has turned them out of the portrait's sight: it shows
    something less deep there."""
    scene = make_scene(identity, motion, side)
    kinds, local, _ = _seen(scene, portrait)
    line = (np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1
    cells = np.stack(np.meshgrid(line, line), -1)
    turn = rotation(portrait.pitch, portrait.yaw, portrait.roll).astype(np.float32)
    head = (local @ turn.T)[..., :2] * portrait.scale + np.array((portrait.x, portrait.y), np.float32) - cells
    body = _foot(portrait, make_scene(identity, portrait, 1)) - _foot(motion, scene)
    shift = np.where((kinds == HEAD)[..., None], head, 0) + np.where((kinds == BODY)[..., None], body, 0)
    return shift.astype(np.float32), kinds, (local @ turn[2]) * np.float32(portrait.scale)


def head_shape(identity: Identity, motion: Motion, side: int) -> tuple[Map, Map, Map, Map]:
    """Depths (g, g) of the head in half picture sides, away from the viewer and relative to the head's own middle;
    where it is, (g, g) bool, as depths mean nothing elsewhere; unit normals (g, g, 3) of its surface, z < 0
    towards the viewer; and how much farther away (g, g) its back is."""
    scene = make_scene(identity, motion, side)
    kinds, local, normals = _seen(scene, motion)
    turn = rotation(motion.pitch, motion.yaw, motion.roll).astype(np.float32)
    depth, is_head = (local @ turn[2]) * np.float32(motion.scale), kinds == HEAD
    thickness = np.where(is_head, np.maximum(_back(scene) * np.float32(motion.scale) - depth, 0), 0)
    return depth, is_head, normals * TOWARDS, thickness


def _back(scene: Scene) -> Map:
    """(g, g) how deep the back of the head lies, hair included, in head units; -inf where there is none."""
    behind = replace(scene, turn=MIRROR @ scene.turn)
    layers = (_back_hair(behind), _bare_head(behind), _front_hair(behind))
    return np.stack([np.where(cover > 0.5, seen.height, -np.inf) for seen, cover in filter(None, layers)]).max(0)


def _back_hair(scene: Scene) -> tuple[Surface, Map] | None:
    """Surface and cover (g, g) of the hair behind everything, where there is any."""
    _, back = hair.hair_solids(scene.identity)
    seen = scene.see(back, scene.turn, 0.05) if back else None
    return None if seen is None else (seen, seen.coverage)


def _bare_head(scene: Scene) -> tuple[Surface, Map]:
    seen = scene.see(head_solids(scene.identity, scene.motion), scene.turn, 0.075)
    return seen, seen.coverage


def _front_hair(scene: Scene) -> tuple[Surface, Map] | None:
    front, _ = hair.hair_solids(scene.identity)
    if not front:
        return None
    seen = scene.see(front, scene.turn, 0.08)
    # Strands only fray its edges, by less than a cell.
    strands = np.full_like(seen.height, 0.5)
    return seen, hair.hair_cover(scene.identity, scene.local(seen), seen, strands, scene.pixel)


def light_map(identity: Identity, side: int) -> tuple[Map, Map]:
    """How bright this person's light makes surfaces of a middling colour that face everywhere, as
    `stages.networks.light` keeps it: logarithms (side, side, 3), and where there is such a surface, (side, side)."""
    line = (np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1
    normals = np.stack([*np.meshgrid(line, line), np.zeros((side, side), np.float32)], -1)
    within = np.square(normals).sum(-1) < 1
    normals[..., 2] = np.sqrt(np.clip(1 - np.square(normals).sum(-1), 0, 1))
    flat = normals.reshape(-1, 3)
    bright = shade(identity, np.full_like(flat, MIDDLING), flat, 0.0) / MIDDLING
    return np.log(np.clip(bright, DARKEST, None)).reshape(side, side, 3), within


def _foot(motion: Motion, scene: Scene) -> Map:
    """(2,) where the body begins."""
    return np.array((motion.x, motion.y)) + motion.scale * scene.torso


def _seen(scene: Scene, portrait: Motion) -> tuple[Map, Map, Map]:
    """Kinds (g, g) and, where a head is seen, places in its own coordinates (g, g, 3) as the portrait has them, and
    normals (g, g, 3) as the scene has them."""
    identity = scene.identity
    kinds = np.full((scene.size, scene.size), BACKDROP)
    local, normals = (np.zeros((scene.size, scene.size, 3), np.float32) for _ in range(2))

    def lay(surface: Surface, cover: Map, kind: int) -> None:
        shown = cover > 0.5
        kinds[shown] = kind
        if kind == HEAD:
            local[shown], normals[shown] = scene.local(surface)[shown], surface.normal[shown]

    if (back := _back_hair(scene)) is not None:
        lay(*back, HEAD)
    for solids, kind in (([neck(scene)], NECK), (body_solids(identity, *scene.torso), BODY)):
        seen = scene.see(solids, VIEWER, 0.12)
        lay(seen, seen.coverage, kind)
    head, bare = _bare_head(scene)
    lay(head, bare, HEAD)
    skin = bare > 0.5
    local[skin], inside = unexpressed(identity, portrait, scene.motion, local[skin])
    kinds[skin] = np.where(inside, INSIDE, HEAD)
    if (front := _front_hair(scene)) is not None:
        over, cover = front
        lay(over, cover * np.where(bare > 0.02, over.height > head.height, True), HEAD)
    return kinds, local, normals
