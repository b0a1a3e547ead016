"""Depth maps of ellipsoids, melted together: the geometry under every drawn head. Called by `training.world`.

An ellipsoid seen in parallel projection has a depth that is one square root of a quadratic in the pixel's place, so
all ellipsoids of a picture come out of one matrix product over the six monomials of that place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Map = NDArray[Any]
"""float32 values per pixel, (h, w, ...)."""


@dataclass(frozen=True)
class Ellipsoid:
    """Centre and radii in head units (x right, y down, z away from the viewer), turned by `degrees` about z and x."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    roll: float = 0.0
    pitch: float = 0.0


@dataclass(frozen=True)
class Surface:
    """What is seen of a group of ellipsoids, per pixel of an (h, w) grid."""

    height: Map
    """Towards the viewer, in head units; continued downwards outside the outline."""
    coverage: Map
    """0 to 1, anti-aliased at the outline."""
    normal: Map
    """(h, w, 3) x right, y down, z towards the viewer."""


def rotation(pitch: float, yaw: float, roll: float) -> NDArray[np.float64]:
    """R = Rz Ry Rx of angles in degrees: the method's convention (section 6.2), so that a point is R @ canonical."""
    (cp, cy, cr), (sp, sy, sr) = (f(np.radians((pitch, yaw, roll))) for f in (np.cos, np.sin))
    x = np.array(((1, 0, 0), (0, cp, -sp), (0, sp, cp)))
    y = np.array(((cy, 0, sy), (0, 1, 0), (-sy, 0, cy)))
    z = np.array(((cr, -sr, 0), (sr, cr, 0), (0, 0, 1)))
    return np.asarray(z @ y @ x)


def monomials(xs: Map, ys: Map) -> Map:
    """(6, h·w) of x², xy, y², x, y, 1 on the grid of columns `xs` (w,) and rows `ys` (h,)."""
    x, y = (a.ravel() for a in np.meshgrid(xs, ys))
    return np.stack((x * x, x * y, y * y, x, y, np.ones_like(x))).astype(np.float32)


def surface(
    solids: Sequence[Ellipsoid],
    turn: NDArray[np.float64],
    basis: Map,
    shape: tuple[int, int],
    pixel: float,
    melt: float,
) -> Surface:
    """The union of `solids`, all turned by the matrix `turn`; `pixel` is one pixel in head units, `melt` the softness
    of the joints in head units (0: hard edges)."""
    fields = np.stack([np.concatenate(_quadratics(solid, turn)) for solid in solids]).astype(np.float32)
    middle, inside = fields[:, :6] @ basis, fields[:, 6:12] @ basis
    height = middle + np.sign(inside) * np.sqrt(np.abs(inside))
    reach = fields[:, 12:13] / (2 * pixel)
    coverage = np.clip((inside * reach).max(0) + 0.5, 0, 1).reshape(shape)
    joined = _join(height, melt).reshape(shape)
    return Surface(joined, coverage, normals(joined, pixel))


def normals(height: Map, pixel: float) -> Map:
    """Unit normals (h, w, 3) of a height map."""
    dy, dx = np.gradient(height, pixel)
    length = 1 / np.sqrt(dx * dx + dy * dy + 1)
    return np.stack((-dx * length, -dy * length, length), -1)


def _join(height: Map, melt: float) -> Map:
    top = height.max(0)
    if melt <= 0 or len(height) == 1:
        return top
    return np.asarray(top + melt * np.log(np.exp(np.maximum((height - top) / melt, -20)).sum(0)))


def _quadratics(solid: Ellipsoid, turn: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Monomial coefficients of the middle height and of (half thickness)², and the outline's softness factor."""
    axes = turn @ rotation(solid.pitch, 0.0, solid.roll)
    to_unit = (axes / np.array(solid.radii)).T
    offset = to_unit @ (turn @ np.array(solid.centre))
    along = to_unit[:, 2]
    size = along @ along
    linear = np.array((to_unit[:, 0] @ along, to_unit[:, 1] @ along, -offset @ along))
    columns = np.stack((to_unit[:, 0], to_unit[:, 1], -offset), 1)
    full = np.outer(linear, linear) - size * (columns.T @ columns)
    full[2, 2] += size
    quad = np.array((full[0, 0], 2 * full[0, 1], full[1, 1], 2 * full[0, 2], 2 * full[1, 2], full[2, 2])) / size**2
    middle = np.array((0, 0, 0, linear[0], linear[1], linear[2])) / size
    radius = float(np.sqrt(solid.radii[0] * solid.radii[1]))
    return middle, quad, np.array((radius * size,))
