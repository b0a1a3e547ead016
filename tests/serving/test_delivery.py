from types import SimpleNamespace

import numpy as np
import pytest

from serving.delivery import Delivery
from serving.flow import Stamp
from serving.protocol import ProtocolError
from stages.config import WindowConfig

WINDOW = WindowConfig(chunk_frames=2, timesteps=(0, 1, 2))


def chunk(number, num_real=2):
    return [Stamp(2 * number + k, 10.0 * (2 * number + k), 0.0) for k in range(num_real)]


def result(number, no_face=(False, False)):
    return SimpleNamespace(
        frames=np.full((2, 1, 1, 3), number, np.uint8), no_face=no_face, stage_ms={"denoise": float(number)}
    )


def run(delivery, chunks, send=True):
    outputs = []
    for number, entering in enumerate(chunks):
        delivery.accept()
        outputs.append(delivery.decoded(entering, result(number, (number == 1, False)), float(number)))
        for output in outputs[-1] if send else ():
            delivery.sent(output, float(number))
    return outputs


def test_the_first_results_are_the_transition_and_later_ones_belong_to_earlier_chunks():
    outputs = run(Delivery(WINDOW, "lossless", 2), [chunk(number) for number in range(5)])
    sources = [[output.source and output.source.seq for output in outs] for outs in outputs]
    assert sources == [[None, None], [None, None], [0, 1], [2, 3], [4, 5]]
    assert outputs[4][0].rgb.max() == 4


def test_no_face_belongs_to_the_frames_of_its_own_call():
    outputs = run(Delivery(WINDOW, "lossless", 2), [chunk(number) for number in range(5)])
    assert [output.no_face for outs in outputs for output in outs] == [False] * 6 + [True, False] + [False] * 2


def test_padding_is_never_output():
    chunks = [chunk(0), chunk(1, num_real=1), chunk(2, num_real=0), chunk(3, num_real=0)]
    outputs = run(Delivery(WINDOW, "live", 2), chunks)
    assert [len(outs) for outs in outputs] == [2, 2, 2, 1]


def test_chunks_enter_until_the_bound_and_again_when_one_is_decoded():
    delivery = Delivery(WINDOW, "live", 2)
    for _ in range(2):
        assert delivery.may_accept
        delivery.accept()
    assert not delivery.may_accept
    delivery.decoded(chunk(0), result(0), 0.0)
    assert delivery.may_accept


def test_a_client_that_shows_nothing_gets_two_chunks_more_than_may_be_in_flight():
    delivery = Delivery(WINDOW, "live", 2)
    number = 0
    while delivery.may_accept:
        run(delivery, [chunk(number)])
        number += 1
    assert number == 4 and delivery.credit == 8
    delivery.shown(2, 9.0)
    assert delivery.may_accept and delivery.credit == 10


def test_receipts_may_neither_shrink_nor_exceed_what_was_sent():
    delivery = Delivery(WINDOW, "live", 2)
    run(delivery, [chunk(0)])
    delivery.shown(1, 0.0)
    for count in (0, 3):
        with pytest.raises(ProtocolError) as error:
            delivery.shown(count, 0.0)
        assert error.value.code == "bad_receipt"


def test_a_client_owes_receipts_from_its_last_progress_on():
    delivery = Delivery(WINDOW, "live", 2)
    assert delivery.owing_s(50.0) == 0.0
    run(delivery, [chunk(0)])
    assert delivery.owing_s(5.0) == 5.0
    delivery.shown(1, 3.0)
    assert delivery.owing_s(5.0) == 2.0
    delivery.shown(1, 4.0)
    assert delivery.owing_s(5.0) == 2.0
    delivery.shown(2, 4.0)
    assert delivery.owing_s(5.0) == 0.0


def test_live_output_is_paced_and_lossless_output_is_not():
    for mode, spread in (("live", True), ("lossless", False)):
        outputs = run(Delivery(WINDOW, mode, 2), [chunk(number) for number in range(4)])
        assert (outputs[3][1].due_s > outputs[3][0].due_s) == spread


def test_a_receipt_names_when_the_newly_shown_frames_were_captured():
    delivery = Delivery(WINDOW, "lossless", 2)
    run(delivery, [chunk(number) for number in range(4)])
    assert delivery.shown(3, 0.0) == [None, None, None]
    assert delivery.shown(6, 0.0) == [None, 0.0, 10.0]
    assert delivery.shown(6, 0.0) == []
