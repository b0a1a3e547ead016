import contextlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.codec import MAX_FRAME_PIXELS, MAX_PARTS, decode, encode, frame_size
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


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG = encode(FRAME, "png")
JPEG = encode(FRAME, "jpeg")


@pytest.mark.parametrize(
    ("data", "codec"),
    [
        (JPEG[:2] + b"\xff" * 2**20 + JPEG[2:], "jpeg"),
        (JPEG[:2] + b"\xff\xfe\0\2" * 2**18 + JPEG[2:], "jpeg"),
        (PNG[:33] + chunk(b"tEXt") * MAX_PARTS + PNG[33:], "png"),
        (PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20))) * 70 + PNG[33:], "png"),
        (PNG[:-12] + chunk(b"tEXt") * MAX_PARTS + PNG[-12:], "png"),
    ],
    ids=["fill", "comments", "chunks", "packed texts", "chunks behind"],
)
def test_a_header_that_costs_much_to_read_is_refused_without_reading_it(data, codec):
    # What the decoder's own way through these bytes would cost is a thousand times the steps of ours.
    with pytest.raises(ProtocolError) as refused:
        frame_size(data, codec)
    assert refused.value.code == "bad_frame"


def test_a_jpeg_with_endless_scans_is_refused_before_it_is_decoded():
    # Each scan has 16 bytes and costs a walk over all pixels: this would take 3 s, and a whole message of them minutes.
    whole = saved(Image.new("RGB", (2048, 2048)), "JPEG", progressive=True)
    last_scan = whole[whole.rfind(b"\xff\xda") : -2]
    assert decode(whole[:-2] + last_scan * 20 + whole[-2:], "jpeg").shape == (2048, 2048, 3)
    with pytest.raises(ProtocolError, match="scans") as refused:
        decode(whole[:-2] + last_scan * 1000 + whole[-2:], "jpeg")
    assert refused.value.code == "bad_frame"


def test_damaged_metadata_leaves_no_remark_in_the_log(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "a camera with a name longer than four bytes"
    whole = saved(Image.fromarray(FRAME), "JPEG", exif=exif)
    # The tag's text now lies behind the end.
    damaged = whole.replace(struct.pack(">HHI", 0x010F, 2, 44), struct.pack(">HHI", 0x010F, 2, 9999))
    assert damaged != whole
    (tmp_path / "frame.jpg").write_bytes(damaged)
    code = "import sys; from serving.codec import decode; decode(open(sys.argv[1], 'rb').read(), 'jpeg')"
    command = [sys.executable, "-c", code, str(tmp_path / "frame.jpg")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(16, 16), (17, 300), (1000, 33)])
def test_every_kind_of_webp_tells_its_size(lossless, mode, size):
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(buffer, "WEBP", lossless=lossless, exact=True)
    assert frame_size(buffer.getvalue(), "webp") == size
    assert decode(buffer.getvalue(), "webp").shape == (size[1], size[0], 3)


@pytest.mark.parametrize("options", [{"progressive": True}, {"icc_profile": bytes(200_000)}, {"exif": bytes(9000)}])
def test_other_jpegs_of_cameras_are_taken(options):
    buffer = io.BytesIO()
    Image.fromarray(FRAME).save(buffer, "JPEG", **options)
    assert decode(buffer.getvalue(), "jpeg").shape == FRAME.shape


def test_damage_behind_the_pixels_is_a_bad_frame_too():
    with pytest.raises(ProtocolError) as refused:
        decode(PNG[:-12] + chunk(b"iCCP") + PNG[-12:], "png")
    assert refused.value.code == "bad_frame"


def test_mutated_pictures_raise_nothing_but_protocol_errors():
    rng = np.random.default_rng(7)
    for codec in ("jpeg", "png", "webp"):
        whole = np.frombuffer(encode(FRAME, codec), np.uint8)
        for _ in range(300):
            data = whole[: rng.integers(1, len(whole) + 1)].copy()
            data[rng.integers(0, min(len(data), 200), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(ProtocolError):
                decode(data.tobytes(), codec)
