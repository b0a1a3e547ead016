"""Who is drawn: all of a person of the synthetic world that motion does not change. Called by `training.world`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Colour = tuple[float, float, float]

SKINS: tuple[Colour, ...] = (
    (0.97, 0.82, 0.72), (0.94, 0.75, 0.62), (0.89, 0.68, 0.52), (0.80, 0.58, 0.42),
    (0.70, 0.48, 0.33), (0.56, 0.37, 0.25), (0.43, 0.28, 0.19), (0.33, 0.21, 0.15),
)  # fmt: skip
HAIRS: tuple[Colour, ...] = (
    (0.07, 0.06, 0.06), (0.15, 0.10, 0.08), (0.27, 0.17, 0.11), (0.42, 0.27, 0.15), (0.58, 0.30, 0.13),
    (0.76, 0.58, 0.30), (0.87, 0.76, 0.52), (0.62, 0.61, 0.60), (0.85, 0.84, 0.83), (0.45, 0.13, 0.12),
    (0.22, 0.28, 0.52), (0.62, 0.30, 0.48),
)  # fmt: skip
IRISES: tuple[Colour, ...] = (
    (0.30, 0.18, 0.09), (0.20, 0.12, 0.07), (0.25, 0.42, 0.60), (0.33, 0.50, 0.35), (0.45, 0.36, 0.18),
    (0.42, 0.47, 0.52),
)  # fmt: skip
HAIR_STYLES = ("bald", "short", "swept", "fringe", "bob", "long", "bun", "afro", "curly", "ponytail", "buzz")
NECKLINES = ("round", "vee", "shirt", "turtleneck", "hood")
BACKDROPS = ("gradient", "bokeh", "panels", "wall")


@dataclass(frozen=True)
class Identity:
    """One person. Lengths are in head units: 1 is about the distance from the middle of the head to the chin."""

    seed: int
    """For the pixel-level details: strands, freckles, backdrop."""
    skin: Colour
    blush: float
    freckles: float
    face_width: float
    jaw_width: float
    chin: float
    cheek: float
    cranium: float
    ear: float
    neck: float
    nose_width: float
    nose_length: float
    nose_depth: float
    eye_size: float
    eye_spacing: float
    eye_y: float
    eye_tilt: float
    eye_open: float
    iris: Colour
    lash: float
    brow_weight: float
    brow_tilt: float
    brow_y: float
    mouth_width: float
    mouth_y: float
    lip: float
    lip_colour: Colour
    hair_style: str
    hair: Colour
    hairline: float
    hair_volume: float
    parting: float
    beard: float
    """0 none, below 0.5 stubble or moustache, up to 1 a full beard."""
    moustache: bool
    glasses: float
    """0 none, otherwise the roundness of the rims."""
    glasses_colour: Colour
    earrings: bool
    neckline: str
    cloth: Colour
    trim: Colour
    stripes: float
    shoulders: float
    backdrop: str
    back_top: Colour
    back_bottom: Colour
    light: tuple[float, float, float]
    """Unit vector to the light: x right, y down, z towards the viewer."""
    ambient: float
    rim: float
    cel: float
    """How far shading snaps to flat tones."""
    ink: float
    """Darkness of the outlines."""


def sample_identity(seed: int) -> Identity:
    """The person of this seed; equal seeds give equal people."""
    rng = np.random.default_rng([seed, 1])
    skin = _jitter(rng, SKINS[rng.integers(len(SKINS))], 0.025)
    hair = _jitter(rng, HAIRS[min(int(rng.exponential(3.2)), len(HAIRS) - 1)], 0.03)
    bearded = rng.random() < 0.33
    style = str(rng.choice(HAIR_STYLES[:5] if bearded and rng.random() < 0.7 else HAIR_STYLES))
    return Identity(
        seed=seed,
        skin=skin,
        hair=hair,
        hair_style=style,
        iris=_jitter(rng, IRISES[rng.integers(len(IRISES))], 0.03),
        beard=float(rng.uniform(0.25, 1.0)) if bearded else 0.0,
        moustache=bool(bearded and rng.random() < 0.85),
        glasses=float(rng.uniform(0.2, 1.0)) if rng.random() < 0.25 else 0.0,
        earrings=bool(not bearded and rng.random() < 0.3),
        neckline=str(rng.choice(NECKLINES)),
        backdrop=str(rng.choice(BACKDROPS)),
        **_face(rng, skin),
        **_surroundings(rng),
    )


def _face(rng: np.random.Generator, skin: Colour) -> dict[str, Any]:
    u = rng.uniform
    lip = np.array(skin) * (0.86, 0.60, 0.60) + np.array((0.06, 0.0, 0.02)) * u(0, 1)
    if rng.random() < 0.3:
        lip = 0.5 * lip + 0.5 * np.array((u(0.55, 0.85), u(0.1, 0.3), u(0.15, 0.4)))
    ranges = {
        "blush": (0.05, 0.6), "face_width": (0.70, 0.82), "jaw_width": (0.50, 0.68), "chin": (0.0, 0.1),
        "cheek": (0.0, 0.1),
        "cranium": (0.78, 0.88), "ear": (0.13, 0.19), "neck": (0.31, 0.43), "nose_width": (0.10, 0.17),
        "nose_length": (0.22, 0.33), "nose_depth": (0.10, 0.2), "eye_size": (0.15, 0.205), "eye_spacing": (0.30, 0.36),
        "eye_y": (-0.10, -0.02), "eye_tilt": (-0.12, 0.16), "eye_open": (0.42, 0.66), "lash": (0.2, 1.0),
        "brow_weight": (0.03, 0.075), "brow_tilt": (-0.12, 0.12), "brow_y": (-0.37, -0.30), "mouth_width": (0.22, 0.31),
        "mouth_y": (0.47, 0.54), "lip": (0.035, 0.075), "hairline": (-0.62, -0.46), "hair_volume": (0.0, 0.11),
        "parting": (-0.5, 0.5),
    }  # fmt: skip
    return {key: float(u(*bounds)) for key, bounds in ranges.items()} | {
        "freckles": float(u(0.3, 1.0)) if rng.random() < 0.2 else 0.0,
        "lip_colour": _colour(lip),
        "glasses_colour": _colour(rng.uniform(0.03, 0.35, 3)),
    }


def _surroundings(rng: np.random.Generator) -> dict[str, Any]:
    angle, lift = rng.uniform(-1.1, 1.1), rng.uniform(0.15, 0.75)
    light = np.array((np.sin(angle) * np.cos(lift), -np.sin(lift), np.cos(angle) * np.cos(lift)))
    cloth = _hue(rng, rng.uniform(0.15, 0.75), rng.uniform(0.25, 0.85))
    return {
        "light": _colour(light / np.linalg.norm(light)),
        "cloth": cloth,
        "trim": _hue(rng, rng.uniform(0.05, 0.6), rng.uniform(0.3, 0.95)),
        "stripes": float(rng.uniform(4, 9)) if rng.random() < 0.2 else 0.0,
        "shoulders": float(rng.uniform(1.5, 1.95)),
        "back_top": _hue(rng, rng.uniform(0.05, 0.5), rng.uniform(0.25, 0.9)),
        "back_bottom": _hue(rng, rng.uniform(0.05, 0.5), rng.uniform(0.2, 0.85)),
        "ambient": float(rng.uniform(0.45, 0.68)),
        "rim": float(rng.uniform(0.0, 0.5)),
        "cel": float(rng.uniform(0.5, 0.9)) if rng.random() < 0.2 else 0.0,
        "ink": float(rng.uniform(0.3, 0.8)) if rng.random() < 0.25 else float(rng.uniform(0.0, 0.15)),
    }


def _jitter(rng: np.random.Generator, colour: Colour, amount: float) -> Colour:
    return _colour(np.array(colour) * (1 + rng.normal(0, amount * 2)) + rng.normal(0, amount * 0.5, 3))


def _hue(rng: np.random.Generator, saturation: float, value: float) -> Colour:
    wheel = 0.5 + 0.5 * np.cos(2 * np.pi * (rng.random() + np.array((0.0, 1 / 3, 2 / 3))))
    return _colour(value * (1 - saturation + saturation * wheel))


def _colour(values: Any) -> Colour:
    r, g, b = (float(v) for v in np.clip(values, -1, 1))
    return r, g, b
