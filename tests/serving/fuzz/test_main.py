import json
import sys

import pytest

from serving.fuzz import __main__ as fuzz
from serving.fuzz.mutations import fuzzed
from serving.fuzz.parsers import Failure


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fuzz", *map(str, arguments)])
    return fuzz.main()


def test_the_command_prints_figures_and_returns_0_when_nothing_failed(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--messages", 300, "--json", "--out", tmp_path) == 0
    figures = json.loads(capsys.readouterr().out)["parsers"]
    assert figures["messages"] == 300 and figures["failures"] == [] and figures["rss_mb"]["end"] > 10
    assert list(tmp_path.iterdir()) == []


def test_the_figures_are_a_table_for_people(monkeypatch, capsys):
    assert run(monkeypatch, "--messages", 100) == 0
    text = capsys.readouterr().out
    assert text.startswith("parsers\n  messages:") and "\n  parse_client:      bad_header " in text


def test_one_message_is_played_again(monkeypatch, capsys):
    assert run(monkeypatch, "--only", 17, "--seed", 4, "--json") == 0
    told = json.loads(capsys.readouterr().out)["parsers"]
    assert told["hex"] == fuzzed(4, 17).data[:200].hex() and sum(told["counts"]["split"].values()) == 1


async def test_the_conversation_that_has_a_message_is_held_again(echo_server):
    server = await echo_server()
    parser_args = fuzz.parse_args(["--only", "25", "--url", server.url])
    figures, failures = await fuzz.run_fuzz(parser_args)
    assert failures == [] and sum(figures["live"]["counts"].values()) > 0


def test_a_message_that_failed_lies_in_a_file(tmp_path):
    told = fuzz.keep(Failure("decode: took 7 s", fuzzed(4, 17)), tmp_path / "new", seed=4)
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "fuzz-4-17.bin" and path.read_bytes() == fuzzed(4, 17).data
    assert str(path) in told and "took 7 s" in told
    assert fuzz.keep(Failure("memory grew"), tmp_path, seed=4) == "memory grew"


@pytest.mark.parametrize("url", ["ws://example.com/v1/stream", "wss://10.0.0.7:8000/", "nonsense"])
def test_only_servers_on_this_machine_are_fuzzed(monkeypatch, capsys, url):
    assert run(monkeypatch, "--messages", 0, "--live", 10, "--url", url) == 2
    assert "--allow-remote" in capsys.readouterr().err
