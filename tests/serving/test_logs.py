import json
import logging
from datetime import datetime

import numpy as np
import pytest
from ray._common.formatters import JSONFormatter
from ray.serve._private.logging_utils import ServeFormatter

from serving.logs import as_text, log_event


@pytest.fixture
def logged():
    """A function that logs one event and returns the line that Serve writes, in text or as JSON."""
    logger = logging.Logger("ray.serve")
    lines = []

    def logged(formatter, *args, **fields):
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(formatter.format(record))
        logger.handlers = [handler]
        log_event(logger, *args, **fields)
        return lines[-1] if lines else None

    return logged


def test_a_line_of_serves_text_log_says_what_happened_to_whom_and_how(logged):
    line = logged(ServeFormatter("Ingress", "r1"), "ended", "5f0c", code="bye", seconds=61.8, delay_ms={"p95": 1517.2})
    assert line.startswith("INFO ") and line.endswith(
        " event=ended session=5f0c code=bye seconds=61.8 delay_ms.p95=1517.2"
    )


def test_a_line_of_serves_json_log_has_each_field_as_a_key(logged):
    line = logged(JSONFormatter(), "ended", "5f0c", code="bye", seconds=61.8, dropped={"stale": 3, "surplus": 0})
    record = json.loads(line)
    fields = {
        "event": "ended",
        "session": "5f0c",
        "code": "bye",
        "seconds": 61.8,
        "dropped": {"stale": 3, "surplus": 0},
    }
    assert fields.items() <= record.items()
    assert record["levelname"] == "INFO" and record["filename"] == "test_logs.py"


def test_a_failure_is_logged_with_its_traceback(logged):
    try:
        raise FloatingPointError("no")
    except FloatingPointError:
        line = logged(JSONFormatter(), "ended", "5f0c", level=logging.ERROR, exc_info=True, code="internal")
    assert json.loads(line)["levelname"] == "ERROR"
    assert "FloatingPointError: no" in json.loads(line)["exc_text"]


def test_what_the_logger_does_not_want_is_not_written(logged):
    assert logged(JSONFormatter(), "idle", "5f0c", level=logging.NOTSET - 1) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("two words", '"two words"'),
        ('she said "no"', r'"she said \"no\""'),
        ("a=b", '"a=b"'),
        ("one\nevent=ended session=forged", r'"one\nevent=ended session=forged"'),
        ("\u2028é", r'"\u2028\u00e9"'),
        (None, "null"),
        (True, "true"),
        (12, "12"),
        (0.5, "0.5"),
        (np.int64(3), "3"),
        (datetime(2026, 1, 2), '"2026-01-02 00:00:00"'),
    ],
)
def test_any_value_stays_one_word_on_one_line(value, text):
    assert as_text({"message": value, "next": 1}) == f"message={text} next=1"
    assert len(text.splitlines()) == 1


def test_mappings_are_flattened():
    assert as_text({"delay_ms": {"p50": 1.0, "p95": None}, "none": {}}) == "delay_ms.p50=1.0 delay_ms.p95=null"
