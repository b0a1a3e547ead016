"""Trains phases one after another: `python -m training.run PHASE [PHASE ...] --recipe NAME --data FOLDER --out OUT`.

Each phase starts from the weights of the one before it, the first one from `--weights` or from nothing. The same
command given again goes on where it was stopped. On a cluster: `ray job submit --working-dir . -- python -m ...`.

    OUT/PHASE/recipe.json, metrics.jsonl, curves/ (TensorBoard), checkpoints/, weights/ (for the next phase)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stages.config import to_dict
from stages.errors import BadConfig, UserError
from training.checkpoints import newest_state
from training.clips import plain_batches
from training.curves import followed, show
from training.engine import CHECKPOINTS, Run, check_same_run
from training.handover import WEIGHTS, digest, finished_run, start_model
from training.layout import manifest_digest, read_manifest
from training.recipes import PHASES, RECIPES, Recipe, find_recipe
from training.task import Task, checked_manifest, perform


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 1 after an error that the user can mend."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        train(args)
    except UserError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    return 0


def train(args: argparse.Namespace) -> None:
    """All phases of a command. Raises UserError."""
    if args.local and args.workers > 1:
        raise BadConfig(f"--local trains in this one process: leave out --workers {args.workers}")
    recipe = find_recipe(args.recipe, overrides(args))
    print(json.dumps(to_dict(recipe), indent=1, default=str))
    weights = args.weights.resolve() if args.weights else None
    for name in args.phases:
        task = make_task(args, recipe, name, weights)
        if is_finished(task):
            print(f"phase {name} is finished: {task.place / WEIGHTS}")
        else:
            _train_phase(args, task)
        weights = task.place / WEIGHTS


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe that a command changes, by dotted name. Raises BadConfig."""
    changes = {f"{name}.num_steps": args.steps for name in args.phases if args.steps is not None}
    if args.seed is not None:
        changes["seed"] = args.seed
    return changes | assigned(args.set)


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """What `--set FIELD=VALUE ...` says, by dotted name. Raises BadConfig."""
    changes = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise BadConfig(f"--set {assignment}: give FIELD=VALUE, such as motion.num_steps=10")
        changes[name] = _value(value)
    return changes


def make_task(args: argparse.Namespace, recipe: Recipe, name: str, weights: Path | None) -> Task:
    """What the workers of a phase are to do. Raises UserError where its data, weights or earlier run do not fit."""
    recipe = dataclasses.replace(recipe, model=start_model(recipe.model, weights))
    data, place = data_of(args.data, name).resolve(), args.out.resolve() / name
    seen = manifest_digest(read_manifest(data))
    run = Run(name, recipe.model, recipe.phase(name), recipe.seed, args.workers, digest(weights), seen)
    threads = args.threads_per_worker or max(1, num_processors() // args.workers)
    task = Task(run, recipe, data, place, weights, threads, args.fsdp)
    checked_manifest(task)
    return task


def is_finished(task: Task) -> bool:
    """Whether the task's phase is trained already. Raises BadResume where its place holds another run."""
    begun = newest_state(task.place / CHECKPOINTS)
    if begun is not None:
        check_same_run(begun.run, task.run, task.place)
    done = finished_run(task.place)
    if done is None:
        return False
    check_same_run(done, task.run, task.place)
    return bool(done["config"]["num_steps"] == task.run.config.num_steps)


def _train_phase(args: argparse.Namespace, task: Task) -> None:
    task.place.mkdir(parents=True, exist_ok=True)
    (task.place / "recipe.json").write_text(json.dumps(to_dict(task.recipe), indent=1, default=str) + "\n")
    begun = newest_state(task.place / CHECKPOINTS)
    num_done = begun.step if begun else 0
    with tqdm(total=task.run.config.num_steps, initial=num_done, desc=task.run.phase, unit="step") as bar:
        if args.local:
            device = torch.device("cuda" if args.gpus else "cpu")
            perform(task, 0, device, plain_batches, lambda metrics: show(bar, metrics))
            return
        from training.workers import connect, train_on_ray

        connect(args.address or os.environ.get("RAY_ADDRESS"), args.workers)
        with followed(task.place, bar):
            train_on_ray(task, args.gpus, args.max_failures)


def data_of(given: list[str], name: str) -> Path:
    """The folder that `--data` has for a phase: PHASE=FOLDER where given, FOLDER otherwise. Raises BadConfig."""
    folders = dict(map(_of_phase, given))
    folder = folders.get(name) or folders.get("")
    if folder is None:
        raise BadConfig(f"phase {name} has no data: give --data FOLDER or --data {name}=FOLDER")
    return Path(folder)


def _of_phase(given: str) -> tuple[str, str]:
    phase, equals, folder = given.partition("=")
    return (phase, folder) if equals and phase in PHASES else ("", given)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def num_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.run", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("phases", nargs="+", choices=PHASES, metavar="PHASE", help=f"in this order; of {', '.join(PHASES)}")
    add("--recipe", required=True, help=f"one of {', '.join(RECIPES)}")
    add("--data", required=True, action="append", help="a data folder, or PHASE=FOLDER; may be given several times")
    add("--out", required=True, type=Path, help="folder for what is trained; given again, the run goes on from it")
    add("--weights", type=Path, help="weights folder that the first phase starts from")
    add("--workers", type=_at_least_one, default=1, help="how many train together")
    add(
        "--threads-per-worker", type=_at_least_one, help="of torch; by default this machine's processors are shared out"
    )
    add("--steps", type=_at_least_one, help="of each phase, instead of the recipe's")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another field of the recipe, by dotted name")
    add("--seed", type=int)
    add("--gpus", action="store_true", help="one for each worker")
    add("--fsdp", action="store_true", help="share weights and optimiser out over the workers (FSDP2)")
    add("--address", help="of a running Ray cluster; by default $RAY_ADDRESS, or else Ray is started here")
    add("--max-failures", type=int, default=30, help="deaths of workers after which the run gives up")
    add("--local", action="store_true", help="train in this process, without Ray")
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
