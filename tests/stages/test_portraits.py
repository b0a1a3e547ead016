import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from stages.errors import BadPortrait
from stages.portraits import (
    MAX_BYTES,
    MAX_PIXELS,
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


def smooth(width: int, height: int) -> Image.Image:
    return noise(5, 7).resize((width, height), Image.Resampling.BICUBIC)


def oriented(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


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
    shown = load_portrait(oriented(image, 6), 80)  # the camera was held sideways: show turned clockwise by 90 degrees
    assert shown[40, 70, 0] == 255 and shown[10, 20, 0] == 0


@pytest.mark.parametrize("size", [(90, 160), (160, 90)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_cut_like_its_upright_self(orientation, size):
    image = noise(*size)
    data = oriented(image, orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    # Nothing is scaled here, so that not one pixel may differ.
    assert np.array_equal(load_portrait(data, 90), np.asarray(upright.crop(square_box(*upright.size))))


@pytest.mark.parametrize("orientation", [3, 6])
def test_turning_after_shrinking_gives_the_same_picture(orientation):
    data = oriented(smooth(300, 200), orientation)
    upright = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    difference = load_portrait(data, 64).astype(int) - load_portrait(upright, 64)
    assert np.abs(difference).max() <= 8 and np.abs(difference).mean() < 0.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0no TIFF file",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x03\0\0\0six\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\0\0",
    ],
)
def test_damaged_exif_is_no_orientation(exif, kind):
    image = smooth(80, 80)
    assert np.array_equal(load_portrait(encoded(image, kind, exif=exif), 80), load_portrait(encoded(image, kind), 80))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    image = smooth(80, 80)
    assert np.array_equal(load_portrait(oriented(image, orientation), 80), np.asarray(image))


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(monkeypatch):
    image = smooth(1200, 1600)
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (load(self), decoded.append(self.size))[0])
    jpeg = load_portrait(oriented(image, 6, "JPEG"), 64)
    assert decoded[-1] == (300, 400)
    png = load_portrait(oriented(image, 6, "PNG"), 64)
    assert decoded[-1] == (1200, 1600)
    assert np.abs(jpeg.astype(int) - png).mean() < 3


def test_a_portrait_at_the_limit_of_pixels_is_taken_and_one_above_it_is_not():
    with pytest.raises(BadPortrait, match=f"at most {MAX_PIXELS} pixels"):
        load_portrait(png_header(8000, 5001), 64)
    with pytest.raises(BadPortrait, match="damaged"):
        load_portrait(png_header(8000, 5000), 64)


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


def test_a_file_too_large_for_the_wire_is_shrunk_and_a_small_one_left_alone():
    data = encoded(noise(1300, 1200))
    assert len(data) > MAX_BYTES
    shrunk = fit_portrait(data)
    assert len(shrunk) < MAX_BYTES and Image.open(io.BytesIO(shrunk)).size == (1024, 1024)
    difference = load_portrait(shrunk, 64).astype(int) - load_portrait(data, 64)
    assert np.abs(difference).mean() < 4
    small = encoded(noise(70, 80))
    assert fit_portrait(small) is small


@pytest.mark.parametrize("name", ["../driving", "/etc/passwd", "nobody", "", "a\0b"])
def test_a_name_from_the_network_reaches_only_bundled_files(name):
    with pytest.raises(BadPortrait, match="no bundled portrait"):
        read_bundled_portrait(name)


def test_every_bundled_portrait_loads_by_its_name():
    for name in bundled_portraits():
        assert load_portrait(read_bundled_portrait(name), 64).shape == (64, 64, 3)


def test_the_command_line_takes_a_file_and_names_what_is_missing(tmp_path, capsys):
    path = tmp_path / "face.png"
    path.write_bytes(b"anything")
    assert read_portrait(str(path)) == b"anything"
    assert capsys.readouterr().err == ""
    with pytest.raises(BadPortrait, match="No such file"):
        read_portrait(str(tmp_path / "none.png"))
    with pytest.raises(BadPortrait, match="ada"):
        read_portrait(str(tmp_path))


def test_the_command_line_remarks_once_that_a_file_is_shrunk(tmp_path, capsys):
    path = tmp_path / "face.png"
    path.write_bytes(encoded(smooth(90, 90)) + bytes(MAX_BYTES))
    assert read_portrait(str(path)) == fit_portrait(path.read_bytes())
    (remark,) = capsys.readouterr().err.splitlines()
    assert str(path) in remark and "1024x1024" in remark


def test_a_file_too_large_that_is_no_picture_is_refused(tmp_path):
    path = tmp_path / "face.png"
    path.write_bytes(bytes(MAX_BYTES + 1))
    with pytest.raises(BadPortrait, match="not a picture"):
        read_portrait(str(path))
