"""The short first training of the tiny model, from nothing to a weights folder, on one core:
`python -m training.quick OUT --minutes 90 --seed 0`.

Phases in order; each has its share of the time and leaves its result in OUT/work, where the next one finds it:
`draw` (people), `autoencoder`, `keypoints`, `motion`, `guider`, `still`, `stream`. Wiring only: the phases live in
modules of their own. A phase can be repeated with `--phases`, which goes on from what is in OUT/work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from stages.config import ModelConfig, save_config
from stages.networks.image_encoder import ImageEncoder
from stages.networks.keypoint_extractor import KeypointExtractor
from stages.networks.motion_encoder import MotionEncoder
from stages.networks.pose_guider import PoseGuider
from stages.networks.vae import Vae
from stages.weights import NETWORKS
from training.animation import (
    EYES,
    LIPS,
    Animator,
    Encoded,
    encode_people,
    new_animator,
    posed,
    train_guider,
    train_still,
    train_stream,
)
from training.autoencoder import train_autoencoder
from training.loop import load, save
from training.perception import Frames, prime_bottleneck, train_keypoints, train_motion_encoder
from training.samples import Kind, People, load_people, prerender
from training.tiny import calmed, tiny_config

SHARES = {
    "draw": 0.17, "autoencoder": 0.2, "keypoints": 0.17, "motion": 0.1, "guider": 0.02, "still": 0.2, "stream": 0.14
}  # fmt: skip
"""Share of the minutes per phase; drawing gets its share as a number of people."""
PEOPLE_PER_MINUTE = 90
STILL_FRAMES, CLIP_FRAMES = 9, 33


@dataclass(frozen=True)
class Run:
    """Where a training is, and how far it may go."""

    out: Path
    minutes: float
    seed: int
    size: int = 256

    @property
    def work(self) -> Path:
        return self.out / "work"

    def share(self, phase: str) -> float:
        """Minutes of a phase."""
        return self.minutes * SHARES[phase]

    @property
    def config(self) -> ModelConfig:
        """The tiny model with what has been measured so far."""
        scale = self.work / "scaling_factor.txt"
        return tiny_config(float(scale.read_text()) if scale.exists() else 1.0)

    def people(self) -> People:
        return load_people(self.work / "people", "still")

    def network(self, name: str) -> nn.Module:
        """A network with the weights it has so far; without any, a fresh one from the seed."""
        torch.manual_seed(self.seed)
        module = NETWORKS[name](self.config)
        return load(module, self.work / f"{name}.safetensors") if self.has(name) else module

    def has(self, name: str) -> bool:
        return (self.work / f"{name}.safetensors").exists()

    def keep(self, name: str, module: nn.Module) -> None:
        save(module, self.work / f"{name}.safetensors")


def draw(run: Run) -> None:
    num_still = max(int(run.share("draw") * PEOPLE_PER_MINUTE), 1)
    num_clips, first = max(num_still // 20, 1), run.seed * 100_000
    folder = run.work / "people"
    prerender(folder, "still", range(first, first + num_still), STILL_FRAMES, run.size)
    prerender(folder, "clip", range(first + 50_000, first + 50_000 + num_clips), CLIP_FRAMES, run.size)


def autoencoder(run: Run) -> None:
    people = run.people()
    start = run.network("vae")
    assert isinstance(start, Vae)
    vae, _ = train_autoencoder(start, flat_pixels(people), features_in(people), run.share("autoencoder"), run.seed)
    run.keep("vae", vae)
    (run.work / "scaling_factor.txt").write_text(str(vae.config.scaling_factor))


def keypoints(run: Run) -> None:
    network = run.network("keypoint_extractor")
    assert isinstance(network, KeypointExtractor)
    train_keypoints(network, run.config.keypoints, all_frames(run.people()), run.share("keypoints"), run.seed)
    run.keep("keypoint_extractor", network)


def motion(run: Run) -> None:
    network = run.network("motion_encoder")
    assert isinstance(network, MotionEncoder)
    if not run.has("motion_encoder"):
        prime_bottleneck(network, run.config.motion_encoder)
    train_motion_encoder(network, run.config, all_frames(run.people()), run.share("motion"), run.seed)
    run.keep("motion_encoder", network)


def guider(run: Run) -> None:
    network, _ = train_guider(run.config, run.people(), run.share("guider"), run.seed)
    run.keep("pose_guider", network)


def still(run: Run) -> None:
    animator, encoded = animation(run, "still")
    train_still(animator, encoded, run.share("still"), run.seed)
    keep_animator(run, animator)


def stream(run: Run) -> None:
    animator, encoded = animation(run, "clip")
    train_stream(animator, encoded, run.share("stream"), run.seed)
    keep_animator(run, animator)


def animation(run: Run, kind: Kind) -> tuple[Animator, Encoded]:
    """The drawing networks as far as they are, and people as they see them."""
    config, people = run.config, load_people(run.work / "people", kind)
    vae, image_encoder, guider, encoder = (
        run.network(name) for name in ("vae", "image_encoder", "pose_guider", "motion_encoder")
    )
    assert isinstance(vae, Vae) and isinstance(image_encoder, ImageEncoder)
    assert isinstance(guider, PoseGuider) and isinstance(encoder, MotionEncoder)
    run.keep("image_encoder", image_encoder)
    encoded = encode_people(config, vae, image_encoder, guider, people, run.seed)
    animator = new_animator(config, guider, encoder, run.seed)
    for name, module in (("reference_unet", animator.reference), ("denoising_unet", animator.denoiser)):
        if run.has(name):
            load(module, run.work / f"{name}.safetensors")
    return animator, encoded


def keep_animator(run: Run, animator: Animator) -> None:
    run.keep("reference_unet", animator.reference)
    run.keep("denoising_unet", animator.denoiser)
    run.keep("pose_guider", animator.guider)


PHASES: dict[str, Callable[[Run], None]] = {
    "draw": draw, "autoencoder": autoencoder, "keypoints": keypoints, "motion": motion, "guider": guider,
    "still": still, "stream": stream,
}  # fmt: skip


def flat_pixels(people: People) -> np.ndarray:
    """All frames of all people, (n · k, s, s, 3)."""
    return people.pixels.reshape(-1, *people.pixels.shape[2:])


def all_frames(people: People) -> Frames:
    """The same with what is true of each."""
    num_frames = people.motions.shape[1]
    motions = people.motions.reshape(-1, people.motions.shape[2])
    return Frames(flat_pixels(people), motions, np.repeat(people.canonical, num_frames, 0))


def features_in(people: People) -> Tensor:
    """(n · k, 3, 2) places of eyes and mouth, in [-1, 1]."""
    frames = all_frames(people)
    points = posed(frames.canonical, frames.motions)[..., :2]
    return torch.cat([points[:, list(EYES)], points[:, list(LIPS)].mean(1, keepdim=True)], 1)


def export(run: Run) -> None:
    """The weights folder: config.json and one safetensors file per network."""
    save_config(calmed(run.config), run.out)
    for name in NETWORKS:
        save(run.network(name), run.out / f"{name}.safetensors")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.quick", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the weights folder to write; intermediate results go to OUT/work")
    parser.add_argument("--minutes", type=float, default=90, help="wall time of all phases together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", nargs="+", choices=tuple(PHASES), default=list(PHASES), metavar="PHASE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    run = Run(args.out, args.minutes, args.seed)
    run.work.mkdir(parents=True, exist_ok=True)
    for phase in args.phases:
        PHASES[phase](run)
    export(run)


if __name__ == "__main__":
    main()
