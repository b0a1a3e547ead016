"""Frames to bytes and back: JPEG, PNG, WebP through Pillow, and raw RGB.

Called by `serving.intake`, `serving.session` and `serving.client`. Sizes are read from the header and checked before
anything is decoded. Pillow rather than OpenCV: it refuses damaged pictures instead of filling them with grey, and
writes nothing of them to the process's log. The largest frames take 0.1 s: the server does it in threads.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from serving.protocol import CodecName, ProtocolError
from stages.messages import Pixels

MAX_FRAME_PIXELS = 4 * 2**20
MIN_FRAME_SIDE_PX = 16
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for bytes that are no whole picture."""
FORMATS: dict[CodecName, str] = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def encode(rgb: Pixels, codec: CodecName, quality: int = 90) -> bytes:
    """One (h, w, 3) uint8 frame as bytes. `quality` (1..100) counts for jpeg and webp."""
    if codec == "raw":
        return np.ascontiguousarray(rgb).tobytes()
    # Level 1 of PNG's compression costs a tenth of the default's time and a few per cent more bytes.
    options = {"compress_level": 1} if codec == "png" else {"quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, FORMATS[codec], **options)
    return buffer.getvalue()


def frame_size(
    data: bytes | memoryview, codec: CodecName, width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """(width, height) of an encoded frame, from its header alone; raw pixels need their size.

    Raises ProtocolError `bad_frame` for what is no picture in this codec, or of an impossible size.
    """
    if codec == "raw":
        return _raw_size(data, width, height)
    try:
        size = _open(data, codec).size
    except DAMAGED as error:
        raise _not_whole(codec, error) from None
    _check_size(*size)
    return size


def decode(data: bytes | memoryview, codec: CodecName, width: int | None = None, height: int | None = None) -> Pixels:
    """One frame as (h, w, 3) uint8 RGB; raw pixels need their size. Raises ProtocolError `bad_frame`."""
    width, height = frame_size(data, codec, width, height)
    if codec == "raw":
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    try:
        return np.asarray(_open(data, codec).convert("RGB"))
    except DAMAGED as error:
        raise _not_whole(codec, error) from None


def _open(data: bytes | memoryview, codec: CodecName) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=(FORMATS[codec],))


def _not_whole(codec: CodecName, error: BaseException) -> ProtocolError:
    return ProtocolError(f"a frame is not a whole {codec} picture ({str(error)[:100]})", "bad_frame")


def _raw_size(data: bytes | memoryview, width: int | None, height: int | None) -> tuple[int, int]:
    if width is None or height is None:
        raise ProtocolError("a raw frame needs width and height in its header", "bad_frame")
    _check_size(width, height)
    if len(data) != width * height * 3:
        raise ProtocolError(
            f"a raw {width}x{height} frame has {width * height * 3} bytes, not {len(data)}", "bad_frame"
        )
    return width, height


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_FRAME_SIDE_PX or width * height > MAX_FRAME_PIXELS:
        raise ProtocolError(
            f"a frame is {width}x{height}: both sides need {MIN_FRAME_SIDE_PX}, and at most {MAX_FRAME_PIXELS} pixels "
            "are taken",
            "bad_frame",
        )
