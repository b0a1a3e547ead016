import io

import numpy as np
import pytest
from PIL import Image

from serving.codec import MAX_FRAME_PIXELS, decode, encode, frame_size
from serving.protocol import ProtocolError

FRAME = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
SMOOTH = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 1, 3))


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_lossless_codecs_give_every_pixel_back(codec):
    assert np.array_equal(decode(encode(FRAME, codec), codec, 64, 48), FRAME)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_lossy_codecs_give_a_close_picture_and_fewer_bytes_at_lower_quality(codec):
    shown = decode(memoryview(encode(SMOOTH, codec, 90)), codec)
    assert shown.shape == SMOOTH.shape and np.abs(shown.astype(int) - SMOOTH).mean() < 3
    assert len(encode(FRAME, codec, 20)) < len(encode(FRAME, codec, 95))


def test_a_greyscale_picture_becomes_rgb():
    buffer = io.BytesIO()
    Image.new("L", (64, 48), 80).save(buffer, "JPEG")
    assert decode(buffer.getvalue(), "jpeg").shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("data", "codec", "size"),
    [
        (b"", "jpeg", (None, None)),
        (b"garbage" * 20, "jpeg", (None, None)),
        (encode(FRAME, "jpeg")[:-200], "jpeg", (None, None)),
        (encode(FRAME, "jpeg"), "png", (None, None)),
        (encode(np.zeros((8, 64, 3), np.uint8), "png"), "png", (None, None)),
        (encode(np.zeros((2049, 2048, 3), np.uint8), "png"), "png", (None, None)),
        (b"\0" * 100, "raw", (64, 48)),
        (b"\0" * 64 * 48 * 3, "raw", (None, None)),
        (b"\0" * 64 * 48 * 3, "raw", (48, 63)),
        (b"", "raw", (65536, 65536)),
    ],
)
def test_what_is_not_a_whole_frame_of_a_sensible_size_is_refused(data, codec, size):
    with pytest.raises(ProtocolError) as refused:
        decode(data, codec, *size)
    assert refused.value.code == "bad_frame"


def test_the_largest_frame_is_taken():
    side = int(MAX_FRAME_PIXELS**0.5)
    assert decode(encode(np.zeros((side, side, 3), np.uint8), "png"), "png").shape == (side, side, 3)


@pytest.mark.parametrize("codec", ["jpeg", "png", "webp", "raw"])
def test_the_size_is_known_before_a_pixel_is_decoded(codec):
    data = encode(FRAME, codec)
    assert frame_size(data, codec, 64, 48) == (64, 48)
    if codec in ("jpeg", "png"):
        assert frame_size(data[: len(data) * 2 // 3], codec) == (64, 48)
