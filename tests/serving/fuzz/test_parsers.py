import time

import pytest

from serving import protocol
from serving.fuzz import parsers as fuzz_parsers
from serving.fuzz.mutations import Fuzzed, fuzzed
from serving.fuzz.parsers import Trial, growth, run_parsers, try_parsers
from serving.protocol import ProtocolError

MESSAGE = Fuzzed(3, "valid", "jpeg", b"{}", True)


def say(error):
    raise error


def test_thousands_of_broken_messages_meet_nothing_but_typed_errors():
    figures, failures = run_parsers(4000, seed=11)
    assert failures == [] and sum(figures["kinds"].values()) == figures["messages"] == 4000
    counts = figures["counts"]
    assert {"accepted", "bad_header", "bad_version"} <= counts["parse_client"].keys()
    assert {"accepted", "bad_frame"} <= counts["decode"].keys()
    assert {"accepted", "bad_receipt"} <= counts["shown"].keys()
    assert {"accepted", "bad_portrait"} <= counts["portrait"].keys()
    assert {"no_credit", "seq_backwards"} <= counts["take lossless"].keys()
    assert counts["ping"] and counts["chunks live"] and counts["chunks lossless"]
    assert max(ms for ms, _ in figures["slowest_ms"].values()) < 1000


def test_a_message_does_the_same_when_it_is_tried_alone():
    def counts(numbers):
        trial = Trial()
        try_parsers([fuzzed(0, number) for number in numbers], trial)
        return trial.counts

    alone = [counts([number]) for number in range(30)]
    together = counts(range(30))
    for name, expected in together.items():
        assert sum((one[name] for one in alone if name in one), type(expected)()) == expected


def test_an_error_without_a_type_is_a_failure_with_its_message():
    trial = Trial()
    assert trial.call("call", MESSAGE, say, ValueError("why")) is None
    (failure,) = trial.failures
    assert "ValueError: why" in failure.what and failure.message == MESSAGE
    assert failure.as_dict()["number"] == 3 and failure.as_dict()["hex"] == b"{}".hex()


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ProtocolError("sentence", "internal"), "no code for a client"),
        (ProtocolError("sentence", "invented"), "no code for a client"),
        (ProtocolError("x" * 2001), "cannot be told"),
        (ProtocolError("\ud800"), "cannot be told"),
    ],
)
def test_an_error_that_no_client_can_be_told_is_a_failure(error, part):
    trial = Trial()
    trial.call("call", MESSAGE, say, error)
    assert part in trial.failures[0].what


def test_a_typed_error_is_counted_and_is_none():
    trial = Trial()
    assert trial.call("call", MESSAGE, say, ProtocolError("sentence")) is None
    assert trial.call("call", MESSAGE, max, 1, 2) == 2
    assert trial.failures == [] and trial.counts["call"] == {"bad_header": 1, "accepted": 1}


def test_a_slow_call_is_a_failure_by_the_processors_time(monkeypatch):
    monkeypatch.setattr(fuzz_parsers, "MAX_CALL_S", 0.02)

    def work():
        until_s = time.process_time() + 0.05
        while time.process_time() < until_s:
            pass

    trial = Trial()
    trial.call("sleep", MESSAGE, time.sleep, 0.05)
    assert trial.failures == []
    trial.call("work", MESSAGE, work)
    assert "took 0.0" in trial.failures[0].what and trial.slowest["work"][1] == 3


def test_failures_are_not_collected_without_end():
    trial = Trial()
    for _ in range(100):
        trial.call("call", MESSAGE, say, ValueError("why"))
    assert len(trial.failures) == fuzz_parsers.MAX_FAILURES and trial.counts["call"]["failed"] == 100


def test_memory_that_grows_is_a_failure_where_there_were_enough_messages():
    assert growth({"early": 100.0, "end": 103.0}, 200_000) != []
    assert growth({"early": 100.0, "end": 101.9}, 200_000) == []
    assert growth({"early": 100.0, "end": 103.0}, 100) == []


def test_frames_without_type_never_reach_the_intake():
    trial = Trial()
    try_parsers([Fuzzed(0, "valid", "jpeg", protocol.pack(protocol.Shown(2)).encode(), True)], trial)
    assert trial.counts.keys() == {"split", "parse_server", "parse_client", "shown"}
