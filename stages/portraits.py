"""Turns whatever picture a user hands in into the square RGB portrait that the stages animate. No torch, no Ray.

Sizes are checked in the header, before a pixel is decoded, so that a small file cannot ask for much memory.
Called by `stages.animate` and by `serving`; both get the same pixels from the same bytes.
"""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from stages.errors import BadPortrait
from stages.jpeg import MAX_SCANS, num_scans
from stages.messages import Pixels

ASSETS = Path(__file__).parent / "assets"
BUNDLED_CLIP = ASSETS / "driving.mp4"
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 40_000_000
MIN_SIDE_PX = 64
MAX_BYTES = 4_000_000
"""What the tools hand on of a file: it must fit into one message to a server."""
SHRUNK_SIDE_PX = 1024
DRAFT_FACTOR = 4
"""A JPEG is decoded at a reduced size while that has so many times the pixels a side that are asked for."""
NUM_PARTS_ABOVE = 8
"""Of a tall picture's surplus height, one part in so many is cut off above the face, the rest below it."""

TURNS = {
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}
"""EXIF orientation to what turns a stored picture upright: mirror it sideways, mirror it upside down, swap axes."""
UPRIGHT = (False, False, False)

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are excluded."""


def load_portrait(data: bytes, size_px: int) -> Pixels:
    """Decodes JPEG, PNG or WebP bytes to uint8 RGB (size_px, size_px, 3).

    Turned as its EXIF says, transparent parts over white, cropped to a square: wide ones about the centre, tall ones
    in the upper part, since faces sit there. Raises BadPortrait with a sentence that names the fix.
    """
    image = _open(data)
    _decode(image, size_px)
    turn = _turn(image)
    smooth = _with_smooth_values(image)
    # Cut and shrunk as it is stored, and turned when it is small.
    box = stored_box(*image.size, turn)
    square = smooth.resize((size_px, size_px), Image.Resampling.LANCZOS, box=box)
    return _turned(np.asarray(_over_white(square)), turn)


def stored_box(width: int, height: int, turn: tuple[bool, bool, bool]) -> Box:
    """Where a stored picture has the square crop of its upright self."""
    sideways, upside_down, swapped = turn
    left, top, right, bottom = square_box(height, width) if swapped else square_box(width, height)
    if swapped:
        left, top, right, bottom = top, left, bottom, right
    if sideways:
        left, right = width - right, width - left
    if upside_down:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def square_box(width: int, height: int) -> Box:
    """The square crop of an upright picture: centred when wide, near the top when tall."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // NUM_PARTS_ABOVE
    return left, top, left + side, top + side


def bundled_portraits() -> dict[str, Path]:
    """Name to file of the portraits that come with the project."""
    return {path.stem: path for path in sorted((ASSETS / "portraits").glob("*.png"))}


def read_portrait(name_or_path: str) -> bytes:
    """The bytes of a bundled portrait, or else of a file, shrunk with a remark where they are too many.

    Every tool gets the same bytes. For the command line only, never for names that arrive over the network. Raises
    BadPortrait.
    """
    bundled = bundled_portraits()
    path = bundled.get(name_or_path, Path(name_or_path))
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise BadPortrait(f"portrait {name_or_path}: {reason}; give a file, or one of {_listing(bundled)}") from None
    fitting = fit_portrait(data)
    if fitting is not data:
        print(
            f"portrait {name_or_path}: {len(data)} bytes are more than the {MAX_BYTES} that are sent, so it is shrunk "
            f"to {SHRUNK_SIDE_PX}x{SHRUNK_SIDE_PX} pixels",
            file=sys.stderr,
        )
    return fitting


def read_bundled_portrait(name: str) -> bytes:
    """The bytes of a bundled portrait. Only known names reach the disk. Raises BadPortrait."""
    bundled = bundled_portraits()
    if name not in bundled:
        raise BadPortrait(f"there is no bundled portrait {name[:64]!r}; there are {_listing(bundled)}")
    return bundled[name].read_bytes()


def fit_portrait(data: bytes) -> bytes:
    """The bytes as they are when there are at most MAX_BYTES, else the square crop as a JPEG. Raises BadPortrait."""
    if len(data) <= MAX_BYTES:
        return data
    smaller = io.BytesIO()
    Image.fromarray(load_portrait(data, SHRUNK_SIDE_PX)).save(smaller, "JPEG", quality=95)
    return smaller.getvalue()


def _listing(bundled: dict[str, Path]) -> str:
    return ", ".join(bundled) or "none"


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Of big pictures, where the check below is the stricter one, and of damaged EXIF, which is passed over.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadPortrait(f"the portrait has more than {MAX_PIXELS} pixels: save it smaller") from None
    except Exception as error:  # a damaged header can raise anything
        raise BadPortrait(f"the portrait is not a picture in {', '.join(FORMATS)}: save it as one") from error
    if image.format in ("JPEG", "MPO") and num_scans(data) > MAX_SCANS:
        raise BadPortrait(f"the portrait has more than {MAX_SCANS} scans: save it as a usual JPEG or PNG")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPortrait(f"the portrait is {width}x{height}, at most {MAX_PIXELS} pixels are taken: save it smaller")
    if min(width, height) < MIN_SIDE_PX:
        raise BadPortrait(f"the portrait is {width}x{height}, both sides need {MIN_SIDE_PX}: take a larger one")
    return image


def _decode(image: Image.Image, size_px: int) -> None:
    try:
        image.draft(None, (DRAFT_FACTOR * size_px, DRAFT_FACTOR * size_px))
        image.load()
    except Exception as error:  # a damaged picture can raise anything
        raise BadPortrait(f"the portrait is damaged ({error}): save it again as JPEG or PNG") from None


def _turn(image: Image.Image) -> tuple[bool, bool, bool]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1), UPRIGHT)
    except Exception:  # damaged EXIF can raise anything, and says nothing
        return UPRIGHT


def _turned(rgb: Pixels, turn: tuple[bool, bool, bool]) -> Pixels:
    sideways, upside_down, swapped = turn
    rgb = rgb[:, ::-1] if sideways else rgb
    rgb = rgb[::-1] if upside_down else rgb
    return np.ascontiguousarray(rgb.swapaxes(0, 1) if swapped else rgb)


def _with_smooth_values(image: Image.Image) -> Image.Image:
    # Palettes and bitmaps cannot be averaged, and Pillow would quietly pick the nearest pixel.
    if image.mode in ("P", "PA", "1"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit greyscale: Pillow's own conversion would clip it to white.
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
