"""Frames to bytes and back: JPEG, PNG, WebP through Pillow, and raw RGB.

Called by `serving.intake`, `serving.session` and `serving.client`. Sizes are read from the header and checked before
anything is decoded. Pillow rather than OpenCV: it refuses damaged pictures instead of filling them with grey, and
writes nothing of them to the process's log. The largest frames take 0.1 s: the server does it in threads.
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
from PIL import Image

from serving.protocol import CodecName, ProtocolError
from stages.jpeg import MAX_SCANS, num_scans
from stages.messages import Pixels

# Pillow's remarks on damaged pictures have what a client wrote in them, and Python keeps every one that it has shown.
warnings.filterwarnings("ignore", module="PIL")

MAX_FRAME_PIXELS = 4 * 2**20
MIN_FRAME_SIDE_PX = 16
MAX_PARTS = 2048
"""Segments of a JPEG or chunks of a PNG; 4 MiB of the usual 8 KiB chunks are 512."""
MAX_OTHER_BYTES = 16 * 2**10
"""Of a PNG, beside its pixels: they may be packed texts that grow a thousandfold."""
JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_PIXELS = 0xDA
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

    Quick whatever the bytes are, since it runs on the event loop: at most `MAX_PARTS` steps through them. Raises
    ProtocolError `bad_frame` for what is no picture in this codec, or of an impossible size.
    """
    if codec == "raw":
        return _raw_size(data, width, height)
    try:
        size = SIZE_READERS[codec](data)
    except IndexError:
        size = None
    if size is None:
        raise ProtocolError(f"a frame is not a whole {codec} picture (its header has no size)", "bad_frame")
    _check_size(*size)
    return size


def decode(data: bytes | memoryview, codec: CodecName, width: int | None = None, height: int | None = None) -> Pixels:
    """One frame as (h, w, 3) uint8 RGB; raw pixels need their size. Raises ProtocolError `bad_frame`."""
    size = frame_size(data, codec, width, height)
    if codec == "raw":
        return np.frombuffer(data, np.uint8).reshape(size[1], size[0], 3)
    if codec == "jpeg" and num_scans(bytes(data)) > MAX_SCANS:
        raise ProtocolError(f"a frame has more than {MAX_SCANS} scans: save it as a usual JPEG", "bad_frame")
    try:
        image = Image.open(io.BytesIO(data), formats=(FORMATS[codec],))
        if image.size != size:
            raise ValueError("it has two sizes")
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged picture can raise anything
        reason = str(error)[:100]
        raise ProtocolError(f"a frame is not a whole {codec} picture ({reason})", "bad_frame") from None


def _jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """From the frame header, with all segments up to the pixels stepped through, as the decoder will do."""
    if data[:2] != b"\xff\xd8":
        return None
    size, at = None, 2
    for _ in range(MAX_PARTS):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == JPEG_PIXELS:
            return size
        if marker in JPEG_SIZES:
            size = _number(data, at + 7, 2), _number(data, at + 5, 2)
        # A marker may have fill bytes before it.
        at += 1 if marker == 0xFF else 2 + _number(data, at + 2, 2)
    return None


def _png_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """From the first chunk, if what there is beside the pixels is little and the chunks are not too many."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return None
    at, num_other_bytes = 8, 0
    for _ in range(MAX_PARTS):
        length = _number(data, at, 4)
        kind = bytes(data[at + 4 : at + 8])
        num_other_bytes += 0 if kind == b"IDAT" else 12 + length
        at += 12 + length
        if kind == b"IEND" or at >= len(data):
            return (_number(data, 16, 4), _number(data, 20, 4)) if num_other_bytes <= MAX_OTHER_BYTES else None
    return None


def _webp_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """From the first chunk, which is of one of three kinds."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    match bytes(data[12:16]):
        case b"VP8 ":
            return _number(data, 26, 2, "little") & 0x3FFF, _number(data, 28, 2, "little") & 0x3FFF
        case b"VP8L":
            bits = _number(data, 21, 4, "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            return _number(data, 24, 3, "little") + 1, _number(data, 27, 3, "little") + 1
    return None


def _number(data: bytes | memoryview, at: int, num_bytes: int, order: Literal["big", "little"] = "big") -> int:
    if at + num_bytes > len(data):
        raise IndexError
    return int.from_bytes(data[at : at + num_bytes], order)


SIZE_READERS = {"jpeg": _jpeg_size, "png": _png_size, "webp": _webp_size}


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
