"""Metrics on the disk and on the bar."""

from __future__ import annotations

import io
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from training.curves import Curves, followed, read_metrics, show


def metrics(step, loss=0.5):
    return {"step": step, "loss": loss, "samples_per_s": 12.0}


def bar():
    return tqdm(total=9, file=io.StringIO())


def test_reports_are_lines_and_curves(tmp_path):
    curves = Curves(tmp_path)
    for step in (2, 4):
        curves.write(metrics(step, step / 8))
    assert read_metrics(tmp_path) == [metrics(2, 0.25), metrics(4, 0.5)]
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 0.25), (4, 0.5)]


def test_a_full_disk_costs_curves_and_not_the_training(tmp_path, monkeypatch, caplog):
    curves = Curves(tmp_path)
    curves.write(metrics(2))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", full)
        curves.write(metrics(4))
    assert "No space left" in caplog.text
    curves.write(metrics(6))
    assert read_metrics(tmp_path) == [metrics(2), metrics(6)]


def test_a_resumed_run_replaces_what_was_said_of_the_steps_it_repeats(tmp_path):
    first = Curves(tmp_path)
    for step in (2, 4, 6):
        first.write(metrics(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    Curves(tmp_path).write(metrics(4, 0.25))
    assert read_metrics(tmp_path) == [metrics(2), metrics(4, 0.25)]


def test_a_place_without_reports_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_the_bar_stands_at_the_reported_step():
    with bar() as shown:
        show(shown, metrics(4))
        assert shown.n == 4 and "loss 0.5000" in shown.postfix


def test_the_bar_follows_a_file_that_others_write(tmp_path):
    with bar() as shown:
        with followed(tmp_path, shown):
            Curves(tmp_path).write(metrics(3))
            deadline_s = time.monotonic() + 10
            while shown.n != 3 and time.monotonic() < deadline_s:
                time.sleep(0.05)
            assert shown.n == 3
            with open(tmp_path / "metrics.jsonl", "a") as file:
                file.write('{"step": 5')
        assert shown.n == 3
