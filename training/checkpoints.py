"""Checkpoints of a phase, from which a run goes on exactly. `training.engine` writes and reads them.

    OUT/PHASE/checkpoints/step-00000500/state.json             which run, which step, made with what
    OUT/PHASE/checkpoints/step-00000500/<group>.safetensors    weights, optimiser, average, critic, critic_optimiser

A folder appears whole or not at all: it is written hidden, flushed to the disk and then renamed. The newest two are
kept. There is no random state in it: what a step draws is a function of the step (`training.phases.phase.draws`).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import UserError

NUM_KEPT = 2
STATE = "state.json"
MAY_CHANGE = {"config.checkpoint_every", "config.log_every"}
"""What of a run a resumed one may have otherwise; `config.num_steps` may only grow."""

Groups = Mapping[str, Mapping[str, Tensor]]

log = logging.getLogger(__name__)


class BadResume(UserError):
    """A run that cannot go on from the checkpoint it finds."""

    code = "bad_resume"


class CheckpointFailed(UserError):
    """A checkpoint that could not be written; the ones before are whole."""

    code = "checkpoint_failed"


@dataclass(frozen=True)
class State:
    """What `state.json` holds."""

    step: int
    """Steps done."""
    num_skipped: int
    """Updates left out so far because something was not finite."""
    run: dict[str, Any]
    """What the run is (`training.engine.Run`), as JSON values."""
    made_with: dict[str, str]
    """Versions and threads, which decide the last bits."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    state: State
    groups: Groups


def made_with(num_threads: int) -> dict[str, str]:
    """The versions and the number of threads that a checkpoint of this process is made with."""
    return {"python": platform.python_version(), "torch": torch.__version__, "threads": str(num_threads)}


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint below `folder` and removes all but the newest two. Raises CheckpointFailed on a full disk."""
    final = step_folder(folder, checkpoint.state.step)
    partial = folder / f".{final.name}-{os.getpid()}.part"
    num_bytes = sum(tensor.nbytes for group in checkpoint.groups.values() for tensor in group.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        _check_space(folder, num_bytes)
        _write(partial, checkpoint)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointFailed(_failure(folder, final, num_bytes, error)) from error
    for old in _folders(folder)[NUM_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_state(folder: Path) -> State | None:
    """The state of the newest checkpoint below `folder` whose state can be read, without loading its tensors."""
    for path in _folders(folder):
        try:
            return _read_state(path)
        except (OSError, ValueError, TypeError):
            continue
    return None


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint below `folder`, None where there is none. Warns of each broken one it passes."""
    for path in _folders(folder):
        try:
            return load_checkpoint(path)
        except BadResume as error:
            log.warning("%s; going on from the one before", error)
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises BadResume where it is broken."""
    try:
        return Checkpoint(_read_state(path), {file.stem: load_file(file) for file in path.glob("*.safetensors")})
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise BadResume(f"checkpoint {path} is broken ({error}): remove it") from error


def check_same(saved: Mapping[str, Any], run: Mapping[str, Any], where: Path, defaults: Mapping[str, Any]) -> None:
    """Raises BadResume that names every field in which a run is not the one that a checkpoint is of.

    A field that did not exist when the checkpoint was written counts as having been at its default.
    """
    now, missing = _flat(run), _flat(defaults)
    before = {name: missing[name] for name in now if name in missing} | _flat(saved)
    wrong = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not _may_change(name, before.get(name), now.get(name))
    ]
    if wrong:
        raise BadResume(f"{where} holds another run: {'; '.join(wrong)}. Give the same again, or another --out")


def _may_change(name: str, before: Any, now: Any) -> bool:
    return name in MAY_CHANGE or (name == "config.num_steps" and now > before)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON values by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write(partial: Path, checkpoint: Checkpoint) -> None:
    """Everything into the hidden folder, and from the caches onto the disk."""
    partial.mkdir()
    for name, tensors in checkpoint.groups.items():
        path = partial / f"{name}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        path.chmod(0o644)
        _flush(path)
    (partial / STATE).write_text(json.dumps(asdict(checkpoint.state), indent=1))
    _flush(partial / STATE)
    _flush(partial)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_space(folder: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise OSError(f"only {free_bytes / 1e6:.1f} MB are free")


def _failure(folder: Path, final: Path, num_bytes: int, error: Exception) -> str:
    left = [path.name for path in _folders(folder)]
    rest = f"{' and '.join(left)} in {folder} stay whole" if left else f"there is none before it in {folder}"
    return f"checkpoint {final.name} of {num_bytes / 1e6:.1f} MB cannot be written ({error}); {rest}: make room there"


def _clean(folder: Path) -> None:
    """Removes what writers that were killed have left."""
    for path in folder.glob(".step-*.part"):
        shutil.rmtree(path, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    """The checkpoints below a folder, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _read_state(path: Path) -> State:
    return State(**json.loads((path / STATE).read_text()))
