"""Probes: a small network that reads motion and identity from drawn pictures, as SMIRK and ArcFace do from films.

Called by `training.evaluate` (readings and embeddings) and `training.perceptual` (its features). It sees nothing but an
oval of pixels whose place does not depend on rotation or expression, so that a wrong picture cannot read right, and
nobody is known by the wall behind them. Training: `python -m training.probes OUT --minutes 60 --seed 0` draws people of
seeds below `HELD_OUT`, fits the network and writes OUT/world.safetensors with scores on people that it has not seen.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from stages.errors import BadWeights
from stages.messages import Floats, Pixels
from stages.networks.normed import NormedBlock, normed
from stages.pipeline import runs_bfloat16
from stages.weights import load_tensors
from training.draw import draw_data
from training.layout import BadData, read_manifest, read_truth, video_path
from training.measures import correlation, explained, verification

BUNDLED = Path(__file__).with_suffix("") / "world.safetensors"
"""The trained probes."""
READINGS = ("yaw", "pitch", "roll", "jaw", "blink", "gaze_x", "gaze_y", "brow", "mouth_wide", "smile")
"""What the motion probe reads: degrees, then values as in `training.motion.Motion`; `blink` is both eyes' mean."""
NUM_POSE = 3
"""So many readings are head pose, the others expression."""
SPREADS = (18.0, 12.0, 10.0, 0.3, 0.3, 0.5, 0.4, 0.5, 0.5, 0.45)
"""About the standard deviations of the readings in training: the network's outputs are in these units."""
MIRRORED = (-1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0)
"""The readings' signs in a mirror."""
MOVED, ZOOMED = 0.02, 0.06
VIEWS = (
    (0.0, 0.0, 1.0),
    (MOVED, 0.0, 1.0),
    (-MOVED, 0.0, 1.0),
    (0.0, MOVED, 1.0),
    (0.0, -MOVED, 1.0),
    (0.0, 0.0, 1 + ZOOMED),
    (0.0, 0.0, 1 - ZOOMED),
)
"""Crops of a head that are read beside a mirrored one: by how much they lie elsewhere (x and y, in half picture sides),
and how much wider they are."""
PICTURE_PX = 256
"""Pictures of other sizes are scaled to this before cropping, so that probes always see the same detail."""
CROP_PX = 112
EMBEDDING_DIM = 64
CHANNELS = (16, 32, 64, 128)
PEAK_RATE = 2e-3
MOMENTUM = 0.1
"""Of the norms' statistics."""
IDENTITY_WEIGHT = 0.1
MARGIN = 1.25
"""Training keeps crops wider than the probes see by this factor, to shift and zoom inside them."""


class Trunk(nn.Module):
    """Pictures (n, 3, h, w) in [-1, 1] to four feature maps, at 1/2, 1/4, 1/8 and 1/16 of their sides."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS):
        super().__init__()
        self.downs = nn.ModuleList(normed(a, b, 2, MOMENTUM) for a, b in zip((3, *channels), channels, strict=False))
        self.blocks = nn.ModuleList([nn.Identity(), *(NormedBlock(c, MOMENTUM) for c in channels[1:])])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x, found = pictures, []
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(F.relu(down(x)))
            found.append(x)
        return found


class Head(nn.Module):
    """The coarsest feature map (n, c, side, side) to (n, num_outputs)."""

    def __init__(self, channels: int, side: int, num_outputs: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 32, 1)
        self.hidden = nn.Linear(32 * side * side, 128)
        self.last = nn.Linear(128, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        squeezed = rearrange(F.relu(self.squeeze(features)), "n c h w -> n (c h w)")
        return self.last(F.relu(self.hidden(squeezed)))


class Probe(nn.Module):
    """Head crops (n, 3, CROP_PX, CROP_PX) in [-1, 1] to readings (n, r) in units of `SPREADS` and embeddings (n, d)."""

    def __init__(self, num_readings: int = len(READINGS), embedding_dim: int = EMBEDDING_DIM):
        super().__init__()
        self.trunk = Trunk()
        self.motion = Head(CHANNELS[-1], CROP_PX // 16, num_readings)
        self.identity = Head(CHANNELS[-1], CROP_PX // 16, embedding_dim)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(oval(crops))[-1]
        return self.motion(features), self.identity(features)


@dataclass(frozen=True)
class Probes:
    """The trained network, ready to read; `scores` are those on held-out renders that its file states."""

    network: Probe
    scores: dict[str, float]

    @torch.inference_mode()
    def look(self, pictures: Pixels, motions: Floats) -> tuple[Floats, Floats]:
        """Readings (n, len(READINGS)) and unit vectors (n, EMBEDDING_DIM) of pictures (n, s, s, 3), whose heads are
        where motions (n, 14) say. Cosines of the vectors are near 1 for one person and near 0 for two.

        Readings are means over `VIEWS`, whose errors are partly their own; the vectors are those of the first."""
        views = [crops(pictures, viewed(motions, *view)) for view in VIEWS]
        readings, embeddings = zip(*(self.network(view) for view in views), strict=True)
        mirrored = self.network(views[0].flip(-1))[0] * torch.tensor(MIRRORED)
        mean = torch.stack([*readings, mirrored]).mean(0)
        return mean.numpy() * np.array(SPREADS, np.float32), F.normalize(embeddings[0], dim=1).numpy()


def load_probes(path: Path = BUNDLED) -> Probes:
    """The trained probes. Raises BadWeights where the file is missing or of another shape."""
    network = Probe()
    try:
        network.load_state_dict({key: value.float() for key, value in load_tensors(path).items()})
        with safe_open(path, "pt") as file:
            scores = json.loads(file.metadata()["scores"])
    except (BadWeights, RuntimeError, KeyError, TypeError) as error:
        raise BadWeights(f"{path} holds no probes: train them by `python -m training.probes {path.parent}`") from error
    return Probes(network.eval().requires_grad_(False), scores)


def crops(pictures: Pixels, motions: Floats, side_px: int = CROP_PX, margin: float = 1.0) -> Tensor:
    """Head crops (n, 3, side, side) in [-1, 1] of pictures (n, s, s, 3), from position and scale of motions (n, 14)."""
    cut = [_crop(picture, motion, side_px, margin) for picture, motion in zip(pictures, motions, strict=True)]
    return signed_crops(torch.from_numpy(np.stack(cut)))


def viewed(motions: Floats, x: float, y: float, zoom: float) -> Floats:
    """Motions (n, 14) whose heads lie elsewhere, and are larger."""
    return np.concatenate([motions[:, :3], (motions[:, 3:6] + (x, y, 0)) * (1, 1, zoom), motions[:, 6:]], 1)


def signed_crops(cut: Tensor) -> Tensor:
    """uint8 (n, h, w, 3) to (n, 3, h, w) in [-1, 1]; in memory the channels stay last, as convolutions like it."""
    return rearrange(cut, "n h w c -> n c h w").float() / 127.5 - 1


def _crop(picture: Pixels, motion: Floats, side_px: int, margin: float) -> Pixels:
    x, y, scale = (float(value) for value in motion[3:6])
    half = margin * scale * PICTURE_PX / 2
    left, top = ((place + 1) * PICTURE_PX / 2 - half for place in (x, y + 0.05 * scale))
    zoom = side_px / (2 * half)
    place = np.array(((zoom, 0, -left * zoom), (0, zoom, -top * zoom)))
    scaled = (
        picture if len(picture) == PICTURE_PX else cv2.resize(picture, (PICTURE_PX,) * 2, interpolation=cv2.INTER_AREA)
    )
    cut = cv2.warpAffine(scaled, place, (side_px, side_px), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cut, np.uint8)


def oval(cut: Tensor) -> Tensor:
    """Crops (n, 3, h, w) without what surrounds the head, so that nobody is known by the wall behind them."""
    line = torch.linspace(-1, 1, cut.shape[-1])
    radius = torch.hypot(line[None] / 0.92, line[:, None] / 1.05)
    return cut * ((1 - radius) / 0.1 + 0.5).clamp(0, 1)


def readings_of(motions: Floats) -> Floats:
    """The true readings (n, len(READINGS)) of motions (n, 14)."""
    pitch, yaw, roll, _, _, _, gaze_x, gaze_y, left, right, brow, jaw, wide, smile = np.asarray(motions, np.float32).T
    return np.stack([yaw, pitch, roll, jaw, (left + right) / 2, gaze_x, gaze_y, brow, wide, smile], 1)


@dataclass(frozen=True)
class Samples:
    """Drawn heads: crops uint8 (n, h, w, 3) wider by `MARGIN`, true readings (n, r), persons (n,) counted upwards."""

    crops: Pixels
    readings: Floats
    persons: NDArray[np.int64]

    def part(self, first: int, last: int) -> Samples:
        """The samples of persons first … last - 1, who are numbered anew; a view, not a copy."""
        inside = slice(*np.searchsorted(self.persons, (first, last)))
        return Samples(self.crops[inside], self.readings[inside], self.persons[inside] - first)


def read_samples(data: Path) -> Samples:
    """All frames of a folder of drawn clips, one person per clip. Raises BadData for filmed clips."""
    side_px, clips = round(CROP_PX * MARGIN), read_manifest(data).clips
    persons = np.repeat(np.arange(len(clips)), [clip.num_frames for clip in clips])
    cut = np.empty((len(persons), side_px, side_px, 3), np.uint8)
    readings, at = np.empty((len(persons), len(READINGS)), np.float32), 0
    for clip in tqdm(clips, desc="reading", unit="clip"):
        truth = read_truth(data, clip.name)
        if truth is None:
            raise BadData(f"{clip.name} in {data} has no truth: probes learn from clips of `python -m training.draw`")
        for frame, motion in zip(_frames(video_path(data, clip.name)), truth.motions, strict=True):
            cut[at], readings[at] = _crop(frame, motion, side_px, MARGIN), readings_of(motion[None])[0]
            at += 1
    return Samples(cut, readings, persons)


def _frames(path: Path) -> Iterator[Pixels]:
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


def augmented(cut: Pixels, rng: np.random.Generator) -> Tensor:
    """Wide crops uint8 (n, h, w, 3) as the probes shall be able to read them: shifted, zoomed, blurred, noisy, tinted.

    Returns (n, 3, CROP_PX, CROP_PX) in [-1, 1].
    """
    n = len(cut)
    shaken = torch.from_numpy(np.stack([_shaken(wide, rng) for wide in cut]))
    gain = rng.uniform(0.8, 1.2, (n, 1, 1, 1)) * rng.uniform(0.93, 1.07, (n, 3, 1, 1))
    bias = rng.uniform(-0.15, 0.15, (n, 1, 1, 1))
    tinted = signed_crops(shaken) * torch.from_numpy(gain).float() + torch.from_numpy(bias).float()
    return tinted.clamp(-1, 1)


def _shaken(wide: Pixels, rng: np.random.Generator) -> Pixels:
    half = CROP_PX / 2
    zoom, (x, y) = 1 / rng.uniform(0.9, 1.1), rng.uniform(-0.06, 0.06, 2) * half
    left, top = len(wide) / 2 + x - half / zoom, len(wide) / 2 + y - half / zoom
    place = np.array(((zoom, 0, -left * zoom), (0, zoom, -top * zoom)))
    cut = cv2.warpAffine(wide, place, (CROP_PX, CROP_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    if rng.random() < 0.5:
        cut = cv2.GaussianBlur(cut, (0, 0), rng.uniform(0.4, 1.3))
    if rng.random() < 0.2:
        cut = np.clip(cut + rng.standard_normal(cut.shape, np.float32) * rng.uniform(1, 6), 0, 255)
    return np.asarray(cut, np.uint8)


def motion_loss(said: Tensor, readings: Tensor) -> Tensor:
    """Huber error of outputs (n, r) in units of the readings' spread; closed eyes say little about gaze."""
    error = F.smooth_l1_loss(said, readings / torch.tensor(SPREADS), reduction="none", beta=0.3)
    gaze, blink = [READINGS.index(name) for name in ("gaze_x", "gaze_y")], READINGS.index("blink")
    weights = torch.ones_like(error)
    weights[:, gaze] = 2 * (1 - 0.95 * readings[:, blink, None])
    return (error * weights).mean()


def identity_loss(embeddings: Tensor, centres: Tensor, persons: Tensor) -> Tensor:
    """Classification of training persons by cosine with their centres, with a margin of 0.2 for the right one."""
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(centres, dim=1).T
    margin = 0.2 * F.one_hot(persons, len(centres))
    return F.cross_entropy(20 * (cosines - margin), persons)


def batches(num_samples: int, batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices (batch,) without end; every sample at most once in every pass."""
    while True:
        order = rng.permutation(num_samples)
        yield from order[: num_samples // batch * batch].reshape(-1, batch)


def train_probe(
    samples: Samples, num_steps: int, minutes: float, seed: int, batch: int, start: Probe | None = None
) -> tuple[Probe, int]:
    """A network trained on all samples, until `num_steps` or `minutes` are over; and its steps.

    `start`: one that has been trained before, which is trained further in place. Where this processor multiplies
    bfloat16, in autocast.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    probe = Probe() if start is None else start.train().requires_grad_(True)
    probe.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    readings, persons = torch.from_numpy(samples.readings), torch.from_numpy(samples.persons)
    centres = nn.Linear(EMBEDDING_DIM, int(persons[-1]) + 1, bias=False)

    def loss_of(chosen: NDArray[np.int64]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=runs_bfloat16()):
            said, embeddings = probe(augmented(samples.crops[chosen], rng))
        identity = identity_loss(embeddings.float(), centres.weight, persons[chosen])
        return motion_loss(said.float(), readings[chosen]) + IDENTITY_WEIGHT * identity

    order = batches(len(persons), batch, rng)
    return probe, fit(nn.ModuleList([probe, centres]), loss_of, order, num_steps, minutes)


def fit(
    modules: nn.Module,
    loss_of: Callable[[NDArray[np.int64]], Tensor],
    order: Iterator[NDArray[np.int64]],
    num_steps: int,
    minutes: float,
) -> int:
    """AdamW, the rate rising and falling over the steps, or over the time where that is shorter; returns the steps."""
    parameters, done, start_s = list(modules.parameters()), 0, time.monotonic()
    optimiser = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=0.02)
    with tqdm(desc="training", total=num_steps, unit="step", mininterval=5) as bar:
        while (spent := max(done / num_steps, (time.monotonic() - start_s) / (60 * minutes))) < 1:
            for group in optimiser.param_groups:
                group["lr"] = PEAK_RATE * min((done + 1) / 100, 0.01 + math.cos(math.pi / 2 * spent) ** 2)
            loss = loss_of(next(order))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 2.0)
            optimiser.step()
            done += 1
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    return done


@torch.inference_mode()
def outputs(probe: Probe, samples: Samples) -> tuple[Floats, Floats]:
    """Readings (n, r) and unit vectors (n, d) of samples."""
    probe.eval()
    inside = slice(round(CROP_PX * (MARGIN - 1) / 2), round(CROP_PX * (MARGIN + 1) / 2))
    parts = (samples.crops[start : start + 100, inside, inside] for start in range(0, len(samples.crops), 100))
    said = [probe(signed_crops(torch.from_numpy(part))) for part in parts]
    readings, embeddings = (torch.cat(part).numpy() for part in zip(*said, strict=True))
    return readings * np.array(SPREADS, np.float32), embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def score(probe: Probe, samples: Samples) -> dict[str, float]:
    """R² and correlation per reading, and how well persons are told apart (`measures.verification`).

    Gaze counts where the eyes are at least half open: closed ones show none.
    """
    said, embeddings = outputs(probe, samples)
    is_open = samples.readings[:, READINGS.index("blink")] <= 0.5
    scores: dict[str, float] = {}
    for column, name in enumerate(READINGS):
        seen = is_open if name.startswith("gaze") else np.ones_like(is_open)
        pair = samples.readings[seen, column], said[seen, column]
        scores |= {f"r2_{name}": explained(*pair), f"r_{name}": correlation(*pair)}
    verified = verification(embeddings, samples.persons)
    return scores | {f"identity_{name}": value for name, value in verified.items()}


def save_probe(probe: Probe, path: Path, scores: dict[str, float], num_steps: int) -> None:
    """Weights as fp16 safetensors; the command, the number of steps and the scores stand in their metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in probe.state_dict().items()}
    packed = {key: value.contiguous() for key, value in halves.items()}
    rounded = {name: round(score, 4) for name, score in scores.items()}
    command = shlex.join(["python", "-m", "training.probes", *sys.argv[1:]])
    metadata = {"command": command, "num_steps": str(num_steps), "scores": json.dumps(rounded)}
    save_file(packed, path, metadata)
    path.chmod(0o644)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.probes", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write world.safetensors to")
    parser.add_argument("--steps", type=int, default=4000, help="training steps; a run that makes all is repeatable")
    parser.add_argument("--minutes", type=float, default=60, help="at most so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, metavar="FILE", help="probes to train further (default: from nothing)")
    parser.add_argument("--data", type=Path, help="a folder of `training.draw --kind poses` (default: OUT/data, drawn)")
    parser.add_argument("--clips", type=int, default=3200, help="people to draw where there is no folder yet")
    parser.add_argument("--hold-out", type=int, default=200, help="people kept for the scores")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        cv2.setNumThreads(args.threads)
    start = load_probes(args.start).network if args.start else None
    data = args.data or args.out / "data"
    if args.data is None:
        draw_data(data, "poses", range(args.clips), 10, PICTURE_PX, 2)
    samples = read_samples(data)
    num_people = int(samples.persons[-1]) + 1
    if num_people <= args.hold_out:
        raise SystemExit(f"--hold-out {args.hold_out} of {num_people} people leaves none to train on")
    num_seen = num_people - args.hold_out
    seen, held = samples.part(0, num_seen), samples.part(num_seen, num_people)
    probe, num_steps = train_probe(seen, args.steps, args.minutes, args.seed, args.batch, start)
    scores = score(probe, held)
    save_probe(probe, args.out / BUNDLED.name, scores, num_steps)
    print(f"{num_steps} steps, {json.dumps(scores)}")


if __name__ == "__main__":
    main()
