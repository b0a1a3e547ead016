"""Turns whatever picture a user hands in into the square RGB portrait that the stages animate. No torch, no Ray.

Sizes are checked in the header, before a pixel is decoded, so that a small file cannot ask for much memory.
Called by `stages.animate` and by `serving`; both get the same pixels from the same bytes.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from stages.errors import BadPortrait
from stages.messages import Pixels

ASSETS = Path(__file__).parent / "assets"
BUNDLED_CLIP = ASSETS / "driving.mp4"
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 40_000_000
MIN_SIDE_PX = 64
NUM_PARTS_ABOVE = 8
"""Of a tall picture's surplus height, one part in so many is cut off above the face, the rest below it."""


def load_portrait(data: bytes, size_px: int, max_bytes: int | None = None) -> Pixels:
    """Decodes JPEG, PNG or WebP bytes to uint8 RGB (size_px, size_px, 3).

    Turned as its EXIF says, transparent parts over white, cropped to a square: wide ones about the centre, tall ones
    in the upper part, since faces sit there. Raises BadPortrait with a sentence that names the fix.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise BadPortrait(f"the portrait has {len(data)} bytes, at most {max_bytes} are taken: save it smaller")
    image = _open(data)
    try:
        upright = _with_smooth_values(ImageOps.exif_transpose(image))
        square = upright.resize((size_px, size_px), Image.Resampling.LANCZOS, box=square_box(*upright.size))
        return np.asarray(_over_white(square))
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise BadPortrait(f"the portrait is damaged ({error}): save it again as JPEG or PNG") from None


def square_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The square crop (left, top, right, bottom) of a picture: centred when wide, near the top when tall."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // NUM_PARTS_ABOVE
    return left, top, left + side, top + side


def bundled_portraits() -> dict[str, Path]:
    """Name to file of the portraits that come with the project."""
    return {path.stem: path for path in sorted((ASSETS / "portraits").glob("*.png"))}


def read_portrait(name_or_path: str) -> bytes:
    """The bytes of a bundled portrait, or else of a file. Raises BadPortrait.

    For the command line only, never for names that arrive over the network.
    """
    bundled = bundled_portraits()
    path = bundled.get(name_or_path, Path(name_or_path))
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise BadPortrait(f"portrait {name_or_path}: {reason}; give a file, or one of {_listing(bundled)}") from None


def read_bundled_portrait(name: str) -> bytes:
    """The bytes of a bundled portrait. Only known names reach the disk. Raises BadPortrait."""
    bundled = bundled_portraits()
    if name not in bundled:
        raise BadPortrait(f"there is no bundled portrait {name[:64]!r}; there are {_listing(bundled)}")
    return bundled[name].read_bytes()


def fit_portrait(data: bytes, max_bytes: int, size_px: int = 1024) -> bytes:
    """The bytes as they are when they fit into `max_bytes`, else the square crop as a JPEG. Raises BadPortrait."""
    if len(data) <= max_bytes:
        return data
    smaller = io.BytesIO()
    Image.fromarray(load_portrait(data, size_px)).save(smaller, "JPEG", quality=95)
    return smaller.getvalue()


def _listing(bundled: dict[str, Path]) -> str:
    return ", ".join(bundled) or "none"


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of big pictures before we can look at their size; the check below is the stricter one.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadPortrait(f"the portrait has more than {MAX_PIXELS} pixels: save it smaller") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadPortrait(f"the portrait is not a picture in {', '.join(FORMATS)}: save it as one") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPortrait(f"the portrait is {width}x{height}, at most {MAX_PIXELS} pixels are taken: save it smaller")
    if min(width, height) < MIN_SIDE_PX:
        raise BadPortrait(f"the portrait is {width}x{height}, both sides need {MIN_SIDE_PX}: take a larger one")
    return image


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
