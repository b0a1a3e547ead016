"""Networks into a phase and out of it: from a weights folder or the seed, and into OUT/PHASE/weights.

Called by `training.task` on the workers, and by `training.run` before it starts them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stages.config import ModelConfig, load_config
from stages.errors import BadConfig, BadWeights
from stages.weights import NETWORKS, build_network, fill_network, load_tensors, save_folder
from training.checkpoints import CheckpointFailed
from training.engine import Run, json_values
from training.optimise import whole
from training.phases.build import CRITIC, start_fresh
from training.phases.phase import Phase

WEIGHTS = "weights"
FINISHED = "finished.json"
READ_BYTES = 1 << 24

log = logging.getLogger(__name__)


def start_model(model: ModelConfig, weights: Path | None) -> ModelConfig:
    """A recipe's model with the one number that training measures, the autoencoder's scale, as the weights have it."""
    if weights is None:
        return model
    scale = load_config(weights).vae.scaling_factor
    return dataclasses.replace(model, vae=dataclasses.replace(model.vae, scaling_factor=scale))


def digest(weights: Path | None) -> str:
    """Names the contents of a weights folder, wherever it lies; empty for none."""
    if weights is None:
        return ""
    total = hashlib.blake2b(digest_size=16)
    for path in [weights / "config.json", *sorted(weights.glob("*.safetensors"))]:
        total.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                total.update(block)
    return total.hexdigest()


def load_networks(
    names: Iterable[str], model: ModelConfig, weights: Path | None, seed: int, may_be_fresh: bool
) -> dict[str, nn.Module]:
    """Networks in fp32, all parameters requiring gradients: from the folder, or drawn from the seed where it has none.

    Raises BadWeights for tensors that do not fit the model, and for missing networks unless `may_be_fresh`.
    """
    networks = {}
    for name in names:
        path = weights / f"{name}.safetensors" if weights else None
        if path and path.exists():
            networks[name] = _loaded(name, model, path)
        elif may_be_fresh:
            networks[name] = fresh_network(name, model, seed)
        else:
            raise BadWeights(f"{name} is missing: this recipe starts from weights, give a whole folder by --weights")
    return networks


def _loaded(name: str, model: ModelConfig, path: Path) -> nn.Module:
    network = fill_network(name, build_network(name, model), load_tensors(path), str(path)).float()
    for parameter in network.parameters():
        # Tensors as they lie in a file may be placed otherwise than fresh ones, which kernels can tell.
        parameter.data = parameter.data.clone()
    return network.requires_grad_(True)


def fresh_network(name: str, model: ModelConfig, seed: int) -> nn.Module:
    """A network of random weights, which depend on the seed and its name alone. Raises BadConfig."""
    build_network(name, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0]))
        return start_fresh(name, NETWORKS[name](model).requires_grad_(True), model)


def whole_networks(phase: Phase) -> dict[str, dict[str, Tensor]]:
    """The tensors of a phase's networks, and of its discriminator, by name. Collective where they are sharded: every
    rank calls it."""
    networks: dict[str, nn.Module] = dict(phase.networks.items())
    if phase.critic is not None:
        networks[CRITIC] = phase.critic
    return {
        name: {key: whole(tensor).detach().cpu() for key, tensor in network.state_dict().items()}
        for name, network in networks.items()
    }


def hand_on(
    model: ModelConfig, networks: dict[str, dict[str, Tensor]], run: Run, weights: Path | None, place: Path
) -> Path:
    """Writes `place`/weights: these networks and, untouched, what else the folder has that the phase started from.

    Raises CheckpointFailed where there is no room; the same command then finishes the phase from its last checkpoint.
    """
    final, partial = place / WEIGHTS, place / f".{WEIGHTS}.part"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_folder(partial, model, networks)
        for path in sorted(weights.glob("*.safetensors")) if weights else []:
            if path.stem not in networks:
                shutil.copyfile(path, partial / path.name)
        for path in partial.iterdir():
            path.chmod(0o644)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        (place / FINISHED).write_text(json.dumps(json_values(run), indent=1))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointFailed(f"{final} cannot be written ({error}): make room and give the command again") from error
    return final


def finished_run(place: Path) -> dict[str, Any] | None:
    """The run whose weights `place` holds, as JSON values; None where no run has finished there."""
    try:
        values: dict[str, Any] = json.loads((place / FINISHED).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadConfig(f"{place / FINISHED} is not valid JSON ({error}): remove it") from error
    return values if (place / WEIGHTS / "config.json").exists() else None
