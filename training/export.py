"""Weights for others to use: `python -m training.export OUT/stream/weights stages/tiny`.

Copies a weights folder with every network stored in half precision. The pose extractor too: its heads run in fp32, and
halves move the bundled model's angles by 0.002 degrees. Refuses a folder in which a network is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from stages.config import load_config
from stages.errors import BadWeights, UserError
from stages.weights import NETWORKS, load_tensors, save_folder


def export(source: Path, target: Path) -> dict[str, int]:
    """Writes `target` and returns the size of each of its files in bytes. Raises BadWeights, BadConfig."""
    missing = [name for name in NETWORKS if not (source / f"{name}.safetensors").exists()]
    if missing:
        raise BadWeights(f"{source} lacks {', '.join(missing)}: run the phases that train them, or copy their files")
    tensors = {name: load_tensors(source / f"{name}.safetensors") for name in NETWORKS}
    halved = {name: {key: _stored(tensor) for key, tensor in state.items()} for name, state in tensors.items()}
    save_folder(target, load_config(source), halved)
    return {path.name: path.stat().st_size for path in sorted(target.glob("*.safetensors"))}


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a weights folder that training has written")
    parser.add_argument("target", type=Path, help="the folder to write")
    args = parser.parse_args(arguments)
    try:
        sizes = export(args.source, args.target)
    except UserError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    for name, num_bytes in sizes.items():
        print(f"{num_bytes / 2**20:6.2f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:6.2f} MiB  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
