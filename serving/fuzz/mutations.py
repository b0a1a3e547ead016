"""Broken messages of every kind, each a function of (seed, number), so that any of them can be made again.

Called by `serving.fuzz` and `serving.fuzz.bad_clients`. Valid messages of every type are the start; then values, keys,
bytes, envelopes or pictures go wrong. Headers are written as text and not by a JSON writer, which could not be wrong
enough.
"""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from serving import protocol
from serving.protocol import MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, CodecName

SIDE_PX = 64
SEQ_STEP = 10
"""A message's frame has the last of so many sequence numbers; the others are for good frames before it."""
CODECS: tuple[CodecName, ...] = ("jpeg", "png", "webp", "raw")
ODD_NUMBERS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "1e-400", "-0", "-0.0", "1.0", "-1", "-1.5", "1.5"),
    *("0", "1", "2", "15", "16", "17", "64", "65535", "65536", "65537", "4294967295", "4294967296", "1e15", "1e16"),
    *(
        "9007199254740992",
        "9007199254740993",
        "18446744073709551616",
        "9" * 400,
        "-" + "9" * 4301,
        "01",
        "+1",
        "1.",
        "0x1",
    ),
)
ODD_VALUES = (
    *("null", "true", "false", "undefined", "tru", "'a'", "[]", "{}", "[1,[2]]", '{"type":"bye"}', "", " ", ","),
    *(
        '""',
        '"1"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\x"',
        '"\n"',
        '"é\U0001f600"',
        '"../ada"',
        '"ada"',
        '"',
    ),
    *('"raw"', '"png"', '"webp"', '"lossless"', '"frame"', '"hello"', '"shown"', '"Hello"', '"' + "x" * 64 + '"'),
    *('"' + "x" * 65 + '"', '"' + "x" * 2001 + '"', "[" * 190 + "]" * 190, "[" * 4000, '{"a":' * 1000),
)
ODD_KEYS = (
    '"extra"',
    '"TYPE"',
    '"type "',
    '"\\u0000"',
    '"\\ud800"',
    '""',
    '"__proto__"',
    '"' + "k" * 3000 + '"',
    "type",
    "1",
)
ODD_HEADERS = (
    *(
        b"",
        b" ",
        b"{",
        b"}",
        b"{}",
        b"[]",
        b"[{}]",
        b"null",
        b"0",
        b'""',
        b'"type"',
        b"{}{}",
        b"{},",
        b"\0",
        b"\xff\xfe",
    ),
    *(
        b"[" * 8000,
        b'{"a":' * 1500,
        b'{"type":"bye"}{"type":"bye"}',
        b'{"type":"bye"}\0',
        b'\xef\xbb\xbf{"type":"bye"}',
    ),
    *('{"type":"bye"}'.encode(encoding) for encoding in ("utf-16", "utf-32")),
)
ODD_BYTES = (
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b'"',
    b"\\",
    b"{",
    b"]",
    b",",
)
ODD_INTEGERS = (0, 1, 15, 16, 0x7F, 0xFF, 0x3FFF, 0x7FFF, 0xFFFF, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)

Fields = list[tuple[str, str]]
"""A header before it is written: JSON texts of keys and values, which may be no JSON at all."""


@dataclass(frozen=True)
class Fuzzed:
    """One message as it goes over the wire."""

    number: int
    kind: str
    """How it was made: a key of `KINDS`."""
    codec: CodecName
    """Of the session that it would do most in."""
    data: bytes
    is_text: bool
    """Whether it goes as a text message; its bytes may be no UTF-8 all the same."""

    @property
    def message(self) -> str | bytes:
        """As a parser gets it. Bytes that are no UTF-8 become lone surrogates."""
        return self.data.decode("utf-8", "surrogateescape") if self.is_text else self.data


def fuzzed(seed: int, number: int) -> Fuzzed:
    """The message of this number."""
    rng = random.Random(f"{seed}.{number}")
    kind = rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    codec = rng.choice(CODECS)
    data, is_text = KINDS[kind][0](rng, number, codec)
    return Fuzzed(number, kind, codec, data, is_text)


def good_frame(seq: int, codec: CodecName) -> str | bytes:
    """A frame without anything wrong, of the size that most have."""
    return protocol.pack(_frame(seq, codec), pictures()[codec][0])


Made = tuple[bytes, bool]
"""The bytes of a message, and whether it is text."""


def _valid(rng: random.Random, number: int, codec: CodecName) -> Made:
    fields, payload = _start(rng, number, codec)
    return _written(rng, _header(fields), payload)


def _odd_values(rng: random.Random, number: int, codec: CodecName) -> Made:
    fields, payload = _start(rng, number, codec)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(fields))
        fields[at] = fields[at][0], rng.choice(rng.choice((ODD_NUMBERS, ODD_VALUES)))
    return _written(rng, _header(fields), payload)


def _odd_keys(rng: random.Random, number: int, codec: CodecName) -> Made:
    fields, payload = _start(rng, number, codec)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(fields) + 1)
        key, value = rng.choice(fields) if fields else ('"type"', '"bye"')
        match rng.randrange(4):
            case 0:
                del fields[at : at + 1]
            case 1:
                fields.insert(at, (rng.choice(ODD_KEYS), value))
            case 2:
                fields.insert(at, (key, rng.choice(rng.choice((ODD_NUMBERS, ODD_VALUES)))))
            case 3:
                fields[at : at + 1] = [(rng.choice(ODD_KEYS), value)]
    return _written(rng, _header(fields), payload)


def _odd_header(rng: random.Random, number: int, codec: CodecName) -> Made:
    return _written(rng, rng.choice(ODD_HEADERS), rng.choice((b"", b"payload")))


def _odd_bytes(rng: random.Random, number: int, codec: CodecName) -> Made:
    fields, payload = _start(rng, number, codec)
    header = bytearray(_header(fields))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(header) + 1)
        header[at : at + rng.randrange(4)] = rng.choice((rng.choice(ODD_BYTES), rng.randbytes(rng.randrange(4))))
    return _written(rng, bytes(header), payload)


def _odd_envelope(rng: random.Random, number: int, codec: CodecName) -> Made:
    fields, payload = _start(rng, number, codec)
    header = _header(fields)
    whole = _envelope(header, payload)
    lengths = (0, 1, len(header) - 1, len(header) + 1, len(whole) - 4, len(whole) - 3, MAX_HEADER_BYTES, *ODD_INTEGERS)
    match rng.randrange(4):
        case 0:
            return whole[: rng.randrange(len(whole))], False
        case 1:
            return struct.pack("<I", len(header)) + whole[4:], False
        case 2:
            # The text and the binary form mixed up.
            return rng.choice(((header, False), (whole, True)))
        case _:
            return struct.pack(">I", rng.choice(lengths)) + whole[4:], False


def _noise(rng: random.Random, number: int, codec: CodecName) -> Made:
    return rng.randbytes(rng.choice((0, 1, 3, 4, 5, 20, 300, 9000))), rng.random() < 0.3


def _near_caps(rng: random.Random, number: int, codec: CodecName) -> Made:
    around = rng.randint(-2, 2)
    fields, payload = _start(rng, number, codec)
    header = _header(fields)
    match rng.randrange(4):
        case 0:
            return _written(rng, header + b" " * (MAX_HEADER_BYTES + around - len(header)), payload)
        case 1:
            text = b'"' + b"x" * (MAX_HEADER_BYTES + around - 17) + b'"'
            return _written(rng, b'{"type":' + text + b"}" * 6, payload)
        case 2:
            return b'"' + b"x" * (MAX_MESSAGE_BYTES + around - 2) + b'"', True
        case _:
            return _envelope(header, bytes(MAX_MESSAGE_BYTES + around - 4 - len(header))), False


def _odd_picture(rng: random.Random, number: int, codec: CodecName) -> Made:
    message = _frame((number + 1) * SEQ_STEP - 1, codec) if rng.random() < 0.9 else protocol.Hello(protocol.PROTOCOL)
    return _envelope(_header(_fields(message)), mutated_picture(rng, codec)), False


def _bomb(rng: random.Random, number: int, codec: CodecName) -> Made:
    codec = "jpeg" if codec == "raw" else codec
    message = _frame((number + 1) * SEQ_STEP - 1, codec) if rng.random() < 0.8 else protocol.Hello(protocol.PROTOCOL)
    return _envelope(_header(_fields(message)), rng.choice(bombs()[codec])), False


KINDS: dict[str, tuple[Callable[[random.Random, int, CodecName], Made], float]] = {
    "valid": (_valid, 5),
    "values": (_odd_values, 20),
    "keys": (_odd_keys, 14),
    "header": (_odd_header, 6),
    "bytes": (_odd_bytes, 14),
    "envelope": (_odd_envelope, 10),
    "noise": (_noise, 5),
    "picture": (_odd_picture, 25),
    "caps": (_near_caps, 0.5),
    "bomb": (_bomb, 0.3),
}
"""How messages are made, and how often. Those of many bytes or pixels are rare, since each takes much longer."""


def _start(rng: random.Random, number: int, codec: CodecName) -> tuple[Fields, bytes]:
    """A valid message's header and payload: half of them frames, few of them an end or what the server says."""
    draw = rng.random()
    if draw < 0.5:
        return _fields(_frame((number + 1) * SEQ_STEP - 1, codec)), rng.choice(pictures()[codec])
    if draw < 0.6:
        hello = protocol.Hello(protocol.PROTOCOL, mode=rng.choice(("live", "lossless")), codec=codec, resume="token")
        return _fields(hello), rng.choice(pictures()["png"])
    if draw < 0.85:
        return _fields(rng.choice((protocol.Shown(number % 5, 1.5), protocol.Ping(1.0, 2.5)))), b""
    if draw < 0.87:
        return _fields(rng.choice((protocol.End(), protocol.Bye()))), b""
    return _fields(rng.choice(SAID_BY_SERVER)), b""


SAID_BY_SERVER: tuple[protocol.ServerMessage, ...] = (
    protocol.Ready("id", 64, 3, 4, 9, 30.0, 6, 4, 5, 30.0, "token"),
    protocol.Credit(6),
    protocol.OutputFrame(0, 1, 1.5, False, 2.5, {"motion": 1.5}, {"stale": 2}, 64, 64),
    protocol.Pong(1.0, 2.0),
    protocol.Notice("loading", "please wait"),
    protocol.Queued(2, 12.5),
    protocol.Recovered({"restart": 1.5}),
    protocol.Error("busy", "sentence", True, retry_s=5.0),
    protocol.Ended(3, 2, 1, {"stale": 1}),
)


def _frame(seq: int, codec: CodecName) -> protocol.DrivingFrame:
    side = SIDE_PX if codec == "raw" else None
    return protocol.DrivingFrame(seq, seq * 4.0, side, side)


def _fields(message: protocol.ClientMessage | protocol.ServerMessage) -> Fields:
    text = protocol.pack(message)
    return [(json.dumps(key), json.dumps(value)) for key, value in json.loads(text).items()]


def _header(fields: Fields) -> bytes:
    return ("{" + ",".join(f"{key}:{value}" for key, value in fields) + "}").encode()


def _envelope(header: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(header)) + header + payload


def _written(rng: random.Random, header: bytes, payload: bytes) -> Made:
    """As text where there is no payload, mostly."""
    if not payload and rng.random() < 0.7:
        return header, True
    return _envelope(header, payload), False


def mutated_picture(rng: random.Random, codec: CodecName) -> bytes:
    """A picture of this codec with something wrong in it."""
    data = bytearray(rng.choice(pictures()[codec]))
    for _ in range(rng.randint(1, 3)):
        if data:
            rng.choice(PICTURE_MUTATIONS)(rng, data)
    return bytes(data)


def _flip_bits(rng: random.Random, data: bytearray) -> None:
    # Headers stand in front: there a bit does more.
    reach = rng.choice((min(64, len(data)), min(700, len(data)), len(data)))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(reach)] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _leave_out(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 40)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randint(1, 400)] * rng.randint(1, 5)


def _splice(rng: random.Random, data: bytearray) -> None:
    other = rng.choice(pictures()[rng.choice(CODECS)])
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]


def _write_integer(rng: random.Random, data: bytearray) -> None:
    num_bytes = rng.choice((1, 2, 3, 4))
    at = rng.randrange(min(len(data), rng.choice((40, 700))))
    value = rng.choice(ODD_INTEGERS) % 2 ** (8 * num_bytes)
    data[at : at + num_bytes] = value.to_bytes(num_bytes, rng.choice(("big", "little")))


def _write_size(rng: random.Random, data: bytearray) -> None:
    """Another size where the format has it, with what guards it."""
    sides = (0, 1, 15, 16, 63, 65, 2048, 2049, 16383, 65535)
    write_size(data, rng.choice(sides), rng.choice(sides))


def write_size(data: bytearray, width: int, height: int) -> None:
    """Changes the size that a picture says it has; leaves what is no picture with a size as it is."""
    if data[:2] == b"\xff\xd8":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        if at > 0:
            data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif data[12:16] == b"IHDR" and len(data) >= 33:
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[8:16] == b"WEBPVP8 ":
        data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    elif data[8:16] == b"WEBPVP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little") >> 28 << 28
        data[21:25] = struct.pack("<I", bits | ((height - 1) & 0x3FFF) << 14 | ((width - 1) & 0x3FFF))
    elif data[8:16] == b"WEBPVP8X":
        data[24:30] = ((width - 1) & 0xFFFFFF).to_bytes(3, "little") + ((height - 1) & 0xFFFFFF).to_bytes(3, "little")


PICTURE_MUTATIONS: Sequence[Callable[[random.Random, bytearray], None]] = (
    *(_flip_bits, _flip_bits, _cut, _leave_out, _repeat, _splice, _write_integer, _write_integer, _write_size),
)


@functools.cache
def pictures() -> dict[CodecName, tuple[bytes, ...]]:
    """Small whole pictures of every codec, in the variants that its files have."""
    smooth = Image.linear_gradient("L").resize((SIDE_PX, SIDE_PX)).convert("RGB")
    # Effects draw from a generator of Pillow's own; this one is the same in every process.
    noise = Image.frombytes("RGB", smooth.size, random.Random(0).randbytes(SIDE_PX**2 * 3))
    clear = smooth.copy()
    clear.putalpha(noise.convert("L"))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "a camera", "a comment"
    return {
        "jpeg": (
            _saved(smooth, "JPEG"),
            _saved(noise, "JPEG", progressive=True, subsampling=0),
            _saved(smooth.convert("L"), "JPEG"),
            _saved(smooth.convert("CMYK"), "JPEG"),
            _saved(smooth, "JPEG", exif=exif, icc_profile=bytes(300), comment=b"words", dpi=(72, 72)),
            _saved(smooth, "JPEG", restart_marker_blocks=2),
        ),
        "png": (
            _saved(smooth, "PNG"),
            _saved(clear, "PNG"),
            _saved(smooth.quantize(16), "PNG", transparency=3),
            _saved(smooth.convert("1"), "PNG"),
            _saved(smooth.convert("I;16"), "PNG"),
            _saved(smooth, "PNG", exif=exif, icc_profile=bytes(300), dpi=(72, 72)),
            _saved(smooth, "PNG", save_all=True, append_images=[noise], duration=40),
        ),
        "webp": (
            _saved(smooth, "WEBP"),
            _saved(noise, "WEBP", lossless=True, quality=0),
            _saved(clear, "WEBP"),
            _saved(clear, "WEBP", lossless=True, exact=True),
            _saved(smooth, "WEBP", exif=exif, icc_profile=bytes(300)),
            _saved(smooth, "WEBP", save_all=True, append_images=[noise], duration=40),
        ),
        "raw": (smooth.tobytes(), noise.tobytes()),
    }


@functools.cache
def bombs() -> dict[CodecName, tuple[bytes, ...]]:
    """Pictures of few bytes that ask for much memory or time."""
    huge = Image.new("RGB", (2048, 2048), (10, 200, 128))
    jpeg = _saved(huge, "JPEG", progressive=True, quality=20)
    png = _saved(huge.convert("1", dither=Image.Dither.NONE), "PNG")
    webp = _saved(huge, "WEBP", quality=10)
    packed = zlib.compress(bytes(2**22), 9)
    return {
        "jpeg": (
            jpeg,
            _with_more_scans(jpeg, 2000),
            jpeg[:2] + b"\xff\xfe\0\2" * 5000 + jpeg[2:],
            jpeg[:2] + b"\xff" * 10_000 + jpeg[2:],
            *_oversized(jpeg),
        ),
        "png": (
            png,
            _saved(Image.new("1", (6000, 6000)), "PNG"),
            _saved(Image.new("1", (10_000, 10_000)), "PNG"),
            _saved(huge.convert("RGBA"), "PNG", compress_level=9),
            *(png[:33] + _chunk(kind, start + packed) * 60 + png[33:] for kind, start in PACKED_CHUNKS),
            png[:33] + _chunk(b"tEXt", b"k\0v") * 3000 + png[33:],
            png[:-12] + _chunk(b"IDAT", packed) * 60 + png[-12:],
            *_oversized(png),
        ),
        "webp": (webp, _saved(huge, "WEBP", lossless=True), *_oversized(webp)),
    }


PACKED_CHUNKS = ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0"))


def _with_more_scans(jpeg: bytes, num_scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each time the decoder walks over all pixels."""
    last = jpeg.rfind(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * num_scans + jpeg[-2:]


def _oversized(picture: bytes) -> list[bytes]:
    """The same bytes, with other sizes in the header."""
    changed = []
    for width, height in ((2049, 2048), (16383, 16383), (65535, 65535), (16, 65535), (2**31 - 1, 2**31 - 1)):
        data = bytearray(picture)
        if data[:1] == b"\x89" or max(width, height) < 2**16:
            write_size(data, width, height)
        changed.append(bytes(data))
    return changed


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
