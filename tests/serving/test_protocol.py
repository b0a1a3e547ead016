import json
import random
import struct

import pytest

from serving.protocol import (
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    DrivingFrame,
    End,
    Ended,
    Error,
    Hello,
    OutputFrame,
    Ping,
    ProtocolError,
    Queued,
    Ready,
    Recovered,
    Shown,
    pack,
    parse_client,
    parse_server,
    split,
)


def binary(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(header)) + header + payload


def code_of(data) -> str:
    with pytest.raises(ProtocolError) as refused:
        parse_client(data)
    return refused.value.code


@pytest.mark.parametrize(
    "message",
    [
        Hello(1, "ada", "lossless", "raw", 80, 7),
        DrivingFrame(3, 12.5, 64, 48),
        Hello(1, "ada", resume="token"),
        Shown(4),
        Shown(4, 12.5),
        Ping(1.0, 2.5),
        End(),
    ],
)
def test_what_a_client_packs_the_server_reads(message):
    assert parse_client(pack(message))[0] == message
    read, payload = parse_client(pack(message, b"pixels"))
    assert read == message and bytes(payload) == b"pixels"


@pytest.mark.parametrize(
    "message",
    [
        Ready("id", 64, 3, 4, 9, 30.0, 6, 4, 5, 30.0),
        OutputFrame(0, None, None, False, None, {"motion": 1.5}, {"stale": 2}, 64, 64),
        Queued(2, 12.5),
        Recovered({"restart": 1.5}),
        Error("idle", "sentence", True),
        Error("busy", "sentence", True, retry_s=5.0),
        Ended(3, 2, 1, {"stale": 1}),
    ],
)
def test_what_the_server_packs_a_client_reads(message):
    assert parse_server(pack(message, b"x")) == (message, memoryview(b"x"))


def test_a_message_without_payload_is_text_and_text_is_a_header_alone():
    assert json.loads(pack(Shown(2))) == {"count": 2, "shown_ms": None, "type": "shown"}
    assert parse_client('{"type": "shown", "count": 2}')[0] == Shown(2)


def test_the_version_is_looked_at_before_anything_that_another_version_may_have_changed():
    assert code_of('{"type": "hello", "protocol": 2, "something": "new"}') == "bad_version"
    assert code_of('{"type": "hello"}') == "bad_version"
    assert code_of('{"type": "hello", "protocol": 1, "something": "new"}') == "bad_header"


@pytest.mark.parametrize(
    "data",
    [
        "",
        "{}",
        "[]",
        "3",
        "not json",
        '{"type": "nothing"}',
        '{"type": "frame"}',
        '{"type": "frame", "seq": -1, "capture_ms": 0}',
        '{"type": "frame", "seq": 1.5, "capture_ms": 0}',
        '{"type": "frame", "seq": "1", "capture_ms": 0}',
        '{"type": "frame", "seq": true, "capture_ms": 0}',
        '{"type": "frame", "seq": 1, "capture_ms": NaN}',
        '{"type": "frame", "seq": 1, "capture_ms": Infinity}',
        '{"type": "frame", "seq": 1, "capture_ms": 1e999}',
        '{"type": "frame", "seq": 1, "capture_ms": 1e300}',
        '{"type": "frame", "seq": 99999999999999999999999999, "capture_ms": 0}',
        '{"type": "frame", "seq": 1, "capture_ms": 0, "width": 0, "height": 5}',
        '{"type": "frame", "seq": 1, "capture_ms": 0, "extra": 1}',
        '{"type": "hello", "protocol": 1, "codec": "gif"}',
        '{"type": "hello", "protocol": 1, "seed": -1}',
        '{"type": "hello", "protocol": 1, "quality": 101}',
        '{"type": "hello", "protocol": 1, "portrait": "' + "x" * 65 + '"}',
        "[" * 8000,
        '{"type":' + "[" * 4000 + "]" * 4000 + "}",
        "\ud800",
        " " * (MAX_HEADER_BYTES + 1),
        b"",
        b"\0\0\0",
        b"\0\0\0\0",
        b"\0\0\0\x05abc",
        b"\xff\xff\xff\xff" + b"x" * 100,
        binary(b"x" * (MAX_HEADER_BYTES + 1)),
        binary(b"\xff\xfe{}"),
    ],
)
def test_a_malformed_header_is_refused_with_a_short_sentence(data):
    with pytest.raises(ProtocolError) as refused:
        parse_client(data)
    assert refused.value.code == "bad_header"
    assert 10 < len(str(refused.value)) < 600


def test_a_message_over_the_cap_is_refused_before_it_is_parsed():
    assert code_of(b"\0" * (MAX_MESSAGE_BYTES + 1)) == "too_large"
    assert code_of("x" * (MAX_MESSAGE_BYTES + 1)) == "too_large"


def test_the_payload_is_not_copied():
    data = binary(b'{"type": "end"}', b"payload")
    assert split(data)[1].obj is data


def test_random_bytes_and_mutated_messages_raise_nothing_but_protocol_errors():
    random.seed(4)
    valid = pack(DrivingFrame(3, 12.5, 64, 48), b"pixels")
    for _ in range(5000):
        data = bytearray(valid if random.random() < 0.8 else random.randbytes(random.randrange(80)))
        for _ in range(random.randrange(4)):
            if data:
                data[random.randrange(len(data))] = random.randrange(256)
        try:
            parse_client(bytes(data))
        except ProtocolError as error:
            assert error.code in ("bad_header", "bad_version")
