"""`python -m stages.convert OFFICIAL OUT`: the authors' weights folder to the project's own format, once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from stages.errors import UserError
from stages.official import LICENCE, is_official, load_official_network, official_config
from stages.weights import NETWORKS, save_folder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def convert(official: Path, out: Path, size_px: int = 512, dtype: torch.dtype = torch.float32) -> None:
    """Writes config.json and one safetensors file per network into `out`. Raises BadWeights or BadConfig."""
    config = official_config(official, size_px)
    for name in tqdm(NETWORKS, desc="converting", unit="network"):
        network = load_official_network(official, name, config)
        save_folder(out, config, {name: network.to(dtype).state_dict()})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.convert", description=__doc__)
    parser.add_argument("official", type=Path, help="folder with personalive/, sd-vae-ft-mse/ and the other two")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size-px", type=int, default=512, help="picture side the weights are for (default 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision to store (default fp32)")
    options = parser.parse_args(arguments)
    try:
        if not is_official(options.official):
            raise UserError(f"{options.official} has no folder personalive/: it is not an official weights folder")
        print(f"Licence: {LICENCE}.", file=sys.stderr)
        convert(options.official, options.out, options.size_px, DTYPES[options.dtype])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
