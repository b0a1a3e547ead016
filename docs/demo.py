"""Makes the README's moving picture: `python docs/demo.py` writes docs/demo.webp, the driving clip beside portraits."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from stages.animate import animate_video
from stages.pipeline import load_stages
from stages.portraits import BUNDLED_CLIP, load_portrait, read_bundled_portrait
from stages.video import read_video, square_resize

PORTRAITS = ("ada", "finn", "nora")
NUM_FRAMES, KEEP_EVERY = 150, 2
SIDE_PX = 192
OUT = Path(__file__).parent / "demo.webp"


def main() -> None:
    stages = load_stages()
    frames = list(islice(read_video(BUNDLED_CLIP), NUM_FRAMES))
    rows = [[frame.rgb for frame in frames]]
    for name in tqdm(PORTRAITS, unit="portrait"):
        portrait = load_portrait(read_bundled_portrait(name), stages.config.size_px)
        rows.append([frame.rgb for frame in animate_video(stages, portrait, frames, seed=0)])
    columns = [np.hstack([square_resize(rgb, SIDE_PX) for rgb in column]) for column in zip(*rows, strict=True)]
    pictures = [Image.fromarray(column) for column in columns[::KEEP_EVERY]]
    duration_ms = round(1000 * KEEP_EVERY * (frames[-1].time_s - frames[0].time_s) / (len(frames) - 1))
    pictures[0].save(OUT, save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0, quality=80, method=6)


if __name__ == "__main__":
    main()
