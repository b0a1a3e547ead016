"""`python -m serving.fuzz [--messages 200000] [--seed S]`: broken messages through everything that reads messages.

With `--url U` as many as `--live` says also go to a running server, beside a good client that must keep its frames.
What fails is printed and written to a file; `--only N` plays message N again, and with `--url` the conversation that
has it. Returns 1 when something failed. The work is in `serving.fuzz.parsers` and `serving.fuzz.live`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.abuse import check_is_local
from serving.fuzz.live import NUM_WORDS, Heard, converse, run_live
from serving.fuzz.mutations import fuzzed
from serving.fuzz.parsers import Failure, Trial, run_parsers, try_parsers
from stages.errors import UserError


def as_text(figures: Mapping[str, Any]) -> str:
    """The figures for people: one line a value, one a call."""
    lines = []
    for part, values in figures.items():
        lines.append(part)
        for name, value in values.items():
            if name == "counts" and any(isinstance(counts, Mapping) for counts in value.values()):
                lines += [f"  {call + ':':18} {_row(counts)}" for call, counts in value.items()]
            elif name != "failures":
                lines.append(f"  {name + ':':18} {_row(value) if isinstance(value, Mapping) else value}")
    return "\n".join(lines)


def _row(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def keep(failure: Failure, folder: Path, seed: int) -> str:
    """The failure for people; its message, if any, is written to a file."""
    if failure.message is None:
        return failure.what
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"fuzz-{seed}-{failure.message.number}.bin"
    path.write_bytes(failure.message.data)
    return f"message {failure.message.number}, in {path}: {failure.what}\n  {failure.message.data[:200].hex()}"


async def play_again(number: int, seed: int, url: str | None) -> tuple[dict[str, Any], list[Failure]]:
    """One message, and what each call said to it; with `url` the conversation that has it."""
    if url is not None:
        heard = Heard()
        await converse(url, seed, number // NUM_WORDS, heard)
        return {"live": {"counts": dict(heard.counts)}}, heard.failures
    trial, message = Trial(), fuzzed(seed, number)
    try_parsers([message], trial)
    told = {"kind": message.kind, "codec": message.codec, "text": message.is_text, "hex": message.data[:200].hex()}
    return {
        "parsers": {**told, "counts": {call: dict(counts) for call, counts in trial.counts.items()}}
    }, trial.failures


async def run_fuzz(args: argparse.Namespace) -> tuple[dict[str, Any], list[Failure]]:
    """What the arguments ask for: the figures, and what failed. Raises UserError."""
    if args.url is not None:
        check_is_local(args.url, args.allow_remote)
    if args.only is not None:
        return await play_again(args.only, args.seed, args.url)
    figures: dict[str, Any] = {}
    failures: list[Failure] = []
    if args.messages:
        figures["parsers"], failures = run_parsers(args.messages, args.seed)
    if args.url is not None and args.live:
        figures["live"], live_failures = await run_live(args.url, args.live, args.seed)
        failures = failures + live_failures
    return figures, failures


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m serving.fuzz", description="Broken messages, by the thousand.")
    parser.add_argument("--messages", type=int, default=200_000, help="through the parsers, in this process")
    parser.add_argument("--url", help="a running server, such as ws://127.0.0.1:8000/v1/stream")
    parser.add_argument("--live", type=int, default=20_000, help="messages to the server at --url")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="play message N again")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for messages that failed")
    parser.add_argument("--allow-remote", action="store_true", help="the server at --url is mine, though elsewhere")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> int:
    """Runs the command; returns 1 when something failed, and 2 when it could not begin."""
    args = parse_args()
    try:
        figures, failures = asyncio.run(run_fuzz(args))
    except UserError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2) if args.json else as_text(figures))
    for failure in failures:
        print(f"FAILED: {keep(failure, args.out, args.seed)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
