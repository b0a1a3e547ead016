import random
from collections import Counter

import pytest

from serving import protocol
from serving.codec import decode, frame_size
from serving.fuzz.mutations import CODECS, KINDS, SIDE_PX, bombs, fuzzed, mutated_picture, pictures, write_size
from serving.protocol import MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, ProtocolError

MESSAGES = [fuzzed(5, number) for number in range(3000)]


def says(message, parse=protocol.parse_client):
    """The type of a message, or the code of its error."""
    try:
        return parse(message.message)[0].type
    except ProtocolError as error:
        return error.code


def test_a_message_is_made_again_from_its_number_alone():
    for number in (0, 7, 1234):
        assert fuzzed(5, number) == MESSAGES[number] != fuzzed(6, number)


def test_every_kind_comes_and_the_costly_ones_are_rare():
    counts = Counter(message.kind for message in MESSAGES)
    assert counts.keys() == KINDS.keys()
    assert counts["caps"] + counts["bomb"] < 0.02 * len(MESSAGES)


def test_some_messages_of_every_type_are_still_read_and_most_are_refused():
    said = Counter(says(message) for message in MESSAGES)
    assert {"hello", "frame", "shown", "ping", "end", "bye", "bad_header", "bad_version", "too_large"} <= said.keys()
    assert said["bad_header"] > len(MESSAGES) / 2
    heard = Counter(says(message, protocol.parse_server) for message in MESSAGES)
    assert {"ready", "credit", "pong", "notice", "queued", "recovered", "error"} <= heard.keys()


def test_sizes_are_tried_on_both_sides_of_the_caps():
    near = [message for message in (fuzzed(5, number) for number in range(20_000)) if message.kind == "caps"]
    assert {len(message.data) > MAX_MESSAGE_BYTES for message in near} == {True, False}
    small = [message for message in near if len(message.data) < 2 * MAX_HEADER_BYTES]
    assert {"bad_header"} < {says(message) for message in small}


def test_text_may_be_no_utf_8_and_its_bytes_are_kept():
    damaged = [message for message in MESSAGES if message.is_text and not valid_utf_8(message.data)]
    assert damaged
    for message in damaged:
        assert message.message.encode("utf-8", "surrogateescape") == message.data
        assert says(message) == "bad_header"


def valid_utf_8(data):
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("codec", CODECS)
def test_the_pictures_are_whole_until_they_are_mutated(codec):
    for data in pictures()[codec]:
        assert decode(data, codec, SIDE_PX, SIDE_PX).shape == (SIDE_PX, SIDE_PX, 3)
    rng = random.Random(1)
    results = Counter()
    for _ in range(200):
        try:
            decode(mutated_picture(rng, codec), codec, SIDE_PX, SIDE_PX)
            results["whole"] += 1
        except ProtocolError:
            results["damaged"] += 1
    assert min(results["whole"], results["damaged"]) > 5


@pytest.mark.parametrize("codec", ["jpeg", "png", "webp"])
def test_a_pictures_header_can_say_another_size(codec):
    for whole in pictures()[codec]:
        data = bytearray(whole)
        write_size(data, 300, 17)
        assert frame_size(data, codec) == (300, 17)
    nothing = bytearray(b"nothing")
    write_size(nothing, 300, 17)
    assert nothing == b"nothing"


def test_bombs_have_few_bytes_for_what_they_ask():
    for codec, data in ((codec, data) for codec, several in bombs().items() for data in several):
        assert len(data) < MAX_MESSAGE_BYTES // 4, codec
