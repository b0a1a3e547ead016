import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stages.errors import BadPortrait
from stages.portraits import (
    bundled_portraits,
    fit_portrait,
    load_portrait,
    read_bundled_portrait,
    read_portrait,
    square_box,
)

RNG = np.random.default_rng(3)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(13, header), (0, b"IDAT")]
    body = b"".join(struct.pack(">I", size) + data + struct.pack(">I", zlib.crc32(data)) for size, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_portrait_of_the_right_size_comes_back_unchanged():
    image = noise(96, 96)
    assert np.array_equal(load_portrait(encoded(image), 96), np.asarray(image))


@pytest.mark.parametrize("size", [(70, 300), (300, 70), (101, 99)])
def test_any_aspect_ratio_becomes_a_square_of_the_asked_size(size):
    assert load_portrait(encoded(noise(*size)), 80).shape == (80, 80, 3)


def test_a_wide_picture_keeps_its_centre_and_a_tall_one_its_upper_part():
    assert square_box(300, 100) == (100, 0, 200, 100)
    assert square_box(100, 300) == (0, 25, 100, 125)


def test_the_exif_orientation_is_honoured():
    image = Image.new("RGB", (80, 80), "black")
    image.paste("red", (0, 0, 80, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: show turned clockwise by 90 degrees
    shown = load_portrait(encoded(image, exif=exif), 80)
    assert shown[40, 70, 0] == 255 and shown[10, 20, 0] == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_lie_over_white(mode):
    image = Image.new("RGBA", (80, 80), (10, 20, 30, 0))
    image.paste((200, 0, 0, 255), (0, 0, 40, 80))
    shown = load_portrait(encoded(image.convert(mode)), 80)
    assert shown[40, 70].tolist() == [255, 255, 255]
    assert shown[40, 10].tolist() != [255, 255, 255]


def test_greyscale_of_8_and_16_bits_become_grey_rgb():
    ramp = np.tile(np.arange(80, dtype=np.uint16) * 800, (80, 1))
    deep = load_portrait(encoded(Image.fromarray(ramp)), 80)
    assert np.array_equal(deep, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2))
    flat = load_portrait(encoded(Image.new("L", (80, 80), 77)), 80)
    assert np.unique(flat).tolist() == [77]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_three_formats_are_read(kind):
    assert load_portrait(encoded(noise(80, 90), kind), 64).dtype == np.uint8


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a picture"),
        (b"hello, I am not a picture" * 50, "not a picture"),
        (encoded(noise(80, 80), "BMP"), "JPEG, PNG, WEBP"),
        (encoded(noise(1, 1)), "1x1"),
        (encoded(noise(63, 500)), "63x500"),
        (png_header(10_000, 10_000), "10000x10000"),
        (png_header(100_000, 100_000), "pixels"),
        (encoded(noise(200, 200))[:5000], "damaged"),
        (encoded(noise(200, 200), "JPEG")[:3000], "damaged"),
    ],
)
def test_what_cannot_be_animated_is_refused_with_the_reason(data, says):
    with pytest.raises(BadPortrait, match=says):
        load_portrait(data, 64)


def test_the_size_in_bytes_is_checked_first():
    with pytest.raises(BadPortrait, match="at most 1000"):
        load_portrait(b"x" * 1001, 64, max_bytes=1000)


def test_a_picture_too_large_for_the_wire_is_shrunk_and_a_small_one_left_alone():
    data = encoded(noise(700, 600))
    assert fit_portrait(data, len(data)) is data
    shrunk = fit_portrait(data, 100_000, size_px=128)
    assert len(shrunk) < 100_000 and Image.open(io.BytesIO(shrunk)).size == (128, 128)


@pytest.mark.parametrize("name", ["../driving", "/etc/passwd", "nobody", "", "a\0b"])
def test_a_name_from_the_network_reaches_only_bundled_files(name):
    with pytest.raises(BadPortrait, match="no bundled portrait"):
        read_bundled_portrait(name)


def test_every_bundled_portrait_loads_by_its_name():
    for name in bundled_portraits():
        assert load_portrait(read_bundled_portrait(name), 64).shape == (64, 64, 3)


def test_the_command_line_takes_a_file_and_names_what_is_missing(tmp_path):
    path = tmp_path / "face.png"
    path.write_bytes(b"anything")
    assert read_portrait(str(path)) == b"anything"
    with pytest.raises(BadPortrait, match="No such file"):
        read_portrait(str(tmp_path / "none.png"))
