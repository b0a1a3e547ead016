"""Lets parts of a model rest that add next to nothing: `python -m training.thin OUT/distill/weights OUT/thin`.

A residual module whose work hardly shows takes as much time as one that matters. So each one of the denoiser and of the
autoencoder's decoder is left out by itself, in answers to held-out people with true poses and expressions, and in the
order of what that costs as many as together cost less than `--limit` are made to answer nothing: their last layer
becomes zero, and the stages do not call them (`stages.networks.layers.rest_idle_modules`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from stages.config import load_config
from stages.errors import BadConfig, UserError
from stages.messages import MotionChunk, MotionState
from stages.networks.layers import Residual
from stages.pipeline import Stages, load_stages
from stages.weights import load_tensors, save_folder
from training import measures
from training.answers import answer_motions
from training.causes import chunks_of, known
from training.evaluate import whole_chunks
from training.trials import Trial, draw_trial, make_cast

SEED = 1000
"""Of the people by whom is decided, none of whom the usual evaluations show."""
DECODER = "vae.decoder."


@dataclass(frozen=True)
class Exam:
    """A trial and the true motion that it is answered with."""

    trial: Trial
    opened: MotionState
    chunks: tuple[MotionChunk, ...]


def make_exam(stages: Stages, index: int, num_frames: int) -> Exam:
    """Trial number `index`."""
    cast = make_cast(SEED, index, num_frames)
    trial = draw_trial(cast, stages.config)
    drive = known(stages, cast, num_frames + stages.config.window.num_transition_frames)
    opened = replace(stages.motion.open(trial.portrait), portrait_tokens=drive.own_tokens)
    return Exam(trial, opened, tuple(chunks_of(stages, drive)))


def quality(stages: Stages, exams: Sequence[Exam]) -> Tensor:
    """(2,) mean PSNR in dB, whole picture and face."""
    found = []
    for exam in exams:
        pictures = answer_motions(stages, exam.trial.portrait, exam.opened, iter(exam.chunks), 0)
        whole = measures.psnr(pictures, exam.trial.truth)
        found.append((whole, measures.face_psnr(pictures, exam.trial.truth, exam.trial.face_boxes)))
    return torch.tensor(np.array(found)).mean(0)


def candidates(stages: Stages, kept: Sequence[str]) -> dict[str, Residual]:
    """Modules that work, by name, but for those whose name holds one of `kept`."""
    networks = {"denoising_unet": stages.denoise.denoising_unet, "vae": stages.decode.vae}
    return {
        name: module
        for network, root in networks.items()
        for name, module in _residuals(root, f"{network}.")
        if not any(part in name for part in kept) and (network != "vae" or name.startswith(DECODER))
    }


def _residuals(root: nn.Module, prefix: str) -> Iterator[tuple[str, Residual]]:
    for name, module in root.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(module, Residual) and not module.rests:
            yield name, module


@contextmanager
def resting(modules: Sequence[Residual]) -> Iterator[None]:
    """These modules rest for a while."""
    for module in modules:
        module.rests = True
    try:
        yield
    finally:
        for module in modules:
            module.rests = False


def chosen(
    modules: Mapping[str, Residual], cost_db: Callable[[Sequence[Residual]], float], limit_db: float
) -> list[str]:
    """Names of modules that together cost less than the limit, by the order of what each costs alone."""
    bar = tqdm(modules.items(), desc="thin: each alone", unit="module", file=sys.stderr)
    alone = {name: cost_db([module]) for name, module in bar}
    cheap = sorted((name for name in alone if alone[name] < limit_db), key=lambda name: alone[name])
    names: list[str] = []
    for name in tqdm(cheap, desc="thin: together", unit="module", file=sys.stderr):
        if cost_db([modules[one] for one in (*names, name)]) < limit_db:
            names.append(name)
    return names


def write(source: Path, target: Path, idle: Mapping[str, Residual]) -> None:
    """The weights of `source` with the last layers of these modules zero."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for network in sorted({name.partition(".")[0] for name in idle}):
        tensors[network] = dict(load_tensors(source / f"{network}.safetensors"))
    for name, module in idle.items():
        network, _, place = name.partition(".")
        last = next(inner for inner, layer in module.named_modules() if layer is module.last)
        for part, _ in module.last.named_parameters():
            tensors[network][f"{place}.{last}.{part}"].zero_()
    save_folder(target, load_config(source), tensors)
    for path in source.glob("*.safetensors"):
        if path.stem not in tensors:
            shutil.copyfile(path, target / path.name)


def thin(args: argparse.Namespace) -> dict[str, Any]:
    """Decides and writes; what was found, as JSON values. Raises UserError."""
    stages = load_stages(str(args.source), device=args.device, num_threads=args.threads)
    num_frames = whole_chunks(stages, args.seconds)
    bar = tqdm(range(args.identities), desc="thin: trials", unit="identity", file=sys.stderr)
    exams = [make_exam(stages, index, num_frames) for index in bar]
    modules, before = candidates(stages, args.keep), quality(stages, exams)

    def cost_db(left_out: Sequence[Residual]) -> float:
        with resting(left_out):
            return float((before - quality(stages, exams)).max())

    names = chosen(modules, cost_db, args.limit)
    with resting([modules[name] for name in names]):
        after = quality(stages, exams)
    write(args.source, args.target, {name: modules[name] for name in names})
    return {"rest": names, "num_working": len(modules) - len(names), "before": before.tolist(), "after": after.tolist()}


def table(report: Mapping[str, Any]) -> str:
    """For people."""
    rest, before, after = report["rest"], report["before"], report["after"]
    lines = [f"  {name}" for name in rest]
    sums = f"{before[0]:.2f} dB, face {before[1]:.2f} dB, becomes {after[0]:.2f} and {after[1]:.2f}"
    return "\n".join([f"{len(rest)} modules rest, {report['num_working']} work on:", *lines, sums])


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    result = argparse.ArgumentParser(prog="python -m training.thin", description=(__doc__ or "").splitlines()[0])
    add = result.add_argument
    add("source", type=Path, help="a weights folder with all networks")
    add("target", type=Path, help="the folder to write")
    add("--limit", type=float, default=0.02, help="dB that it may cost, whole picture and face (default 0.02)")
    add("--keep", action="append", default=[], metavar="NAME", help="parts of names of what shall work on")
    add("--identities", type=int, default=4, help="people by whom is decided (default 4)")
    add("--seconds", type=float, default=0.5, help="length of each trial (default 0.5)")
    add("--json", action="store_true", help="print only the JSON")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--threads", type=int, default=2, help="torch threads (default 2)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parser().parse_args(argv)
    try:
        if args.identities < 1 or args.seconds <= 0 or args.limit <= 0 or args.threads < 1:
            raise BadConfig("--identities and --threads must be at least 1, --seconds and --limit above 0")
        if args.target.resolve() == args.source.resolve():
            raise BadConfig(f"{args.target} would be written over while it is read: give another folder")
        report = thin(args)
    except UserError as error:
        print(f"error ({error.code}): {error}", file=sys.stderr)
        return 2
    print(json.dumps(report) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
