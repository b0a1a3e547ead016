"""Where a model's error is from: held-out trials with what it finds in pictures, and with what the world knows.

    python -m training.causes --weights tiny --identities 4 --seconds 1.5 --seed 0

The extractors may miss a pose or an expression, the mover may look up wrong places, the denoiser may draw them wrongly.
So each trial (`training.trials`) is answered with found and with true keypoints and motion tokens, by the whole model
and, where it has one, by its mover alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import torch
from tqdm import tqdm

from stages.canvas import ShownPortrait, canvases
from stages.errors import BadConfig, UserError
from stages.images import pixels_of, portrait_tensor
from stages.keypoints import interpolate
from stages.messages import Floats, MotionChunk, MotionState, Pixels
from stages.pipeline import Stages, load_stages
from training import measures
from training.answers import answer_motions, tailed_motions
from training.evaluate import means, rounded, whole_chunks
from training.known import FIRST_EXPRESSION, expression_tokens
from training.trials import Cast, Trial, as_arrays, draw_trial, make_cast, project_all


@dataclass(frozen=True)
class Drive:
    """What moves a portrait: its own motion, and that of k frames."""

    own_keypoints: Floats
    """(K, 3)."""
    keypoints: Floats
    """(k, K, 3)."""
    own_tokens: Floats
    """(T, D)."""
    tokens: Floats
    """(k, T, D)."""


def found(stages: Stages, opened: MotionState, chunks: Sequence[MotionChunk]) -> Drive:
    """What the motion stage has found, without the transition."""
    keypoints, tokens = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("keypoints", "tokens"))
    behind = stages.config.window.num_transition_frames
    return Drive(keypoints[0], keypoints[behind:], opened.portrait_tokens, tokens[behind:])


@torch.inference_mode()
def known(stages: Stages, cast: Cast, num_frames: int) -> Drive:
    """What the world knows of a cast's first frames, the last repeated up to `num_frames`."""
    shown = cast.shown + cast.shown[-1:] * (num_frames - len(cast.shown))
    encoder = stages.motion.motion_encoder
    expressions = torch.from_numpy(as_arrays((cast.rest, *shown))[:, FIRST_EXPRESSION:]).to(encoder.pe.device)
    tokens = expression_tokens(expressions, encoder, stages.config.motion_encoder).float().cpu().numpy()
    keypoints = project_all(cast.person, (cast.rest, *shown)).astype(np.float32)
    return Drive(keypoints[0], keypoints[1:], tokens[0], tokens[1:])


def chunks_of(stages: Stages, drive: Drive) -> Iterator[MotionChunk]:
    """The drive as the motion stage would send it, the transition in front."""
    window = stages.config.window
    parts = []
    for own, frames in ((drive.own_keypoints, drive.keypoints), (drive.own_tokens, drive.tokens)):
        leading = interpolate(own[None], frames[:1], window.num_transition_frames)
        parts.append(np.concatenate([leading, frames]).astype(np.float32))
    keypoints, tokens = parts
    ends = [0, *range(window.num_transition_frames + window.chunk_frames, len(tokens) + 1, window.chunk_frames)]
    for start, end in pairwise(ends):
        yield MotionChunk(tokens[start:end], keypoints[start:end], (False,) * window.chunk_frames)


@torch.inference_mode()
def moved(stages: Stages, portrait: Pixels, drive: Drive, num_frames: int) -> Pixels:
    """(num_frames, s, s, 3) the portrait as the model's canvases show it moved."""
    guider = stages.denoise.pose_guider
    parts = (drive.own_keypoints, drive.own_tokens, drive.keypoints[:num_frames], drive.tokens[:num_frames])
    device = next(guider.parameters()).device
    own_keypoints, own_tokens, keypoints, tokens = (torch.from_numpy(part).to(device) for part in parts)
    picture = portrait_tensor(portrait, stages.config.size_px)[0].to(device) / 2 + 0.5
    shown = ShownPortrait(picture, own_keypoints, own_tokens)
    turned = canvases(keypoints, tokens, shown, guider.mover, stages.config)[:, 3:6].cpu()
    return np.stack([pixels_of(frame * 2 - 1) for frame in turned])


def figures(trial: Trial, pictures: Pixels) -> dict[str, float]:
    """Against the trial's true answer."""
    return {
        "psnr_db": measures.psnr(pictures, trial.truth),
        "psnr_face_db": measures.face_psnr(pictures, trial.truth, trial.face_boxes),
    }


def causes(stages: Stages, seed: int, index: int, num_frames: int) -> dict[str, dict[str, float]]:
    """Figures of one trial by row: who answers, with which keypoints and which expressions."""
    cast = make_cast(seed, index, num_frames)
    trial = draw_trial(cast, stages.config)
    opened = stages.motion.open(trial.portrait)
    drives = {"found": found(stages, opened, tailed_motions(stages, opened, trial.driving))}
    drives["true"] = known(stages, cast, len(drives["found"].tokens))
    rows = {"portrait, unmoved": figures(trial, np.repeat(trial.portrait[None], num_frames, 0))}
    for points, expressions in product(drives, drives):
        told = drives[expressions]
        drive = replace(drives[points], own_tokens=told.own_tokens, tokens=told.tokens)
        name = f"{points} keypoints, {expressions} expressions"
        if stages.config.pose_guider.shows_portrait:
            rows[f"moved, {name}"] = figures(trial, moved(stages, trial.portrait, drive, num_frames))
        state = replace(opened, portrait_tokens=drive.own_tokens)
        pictures = answer_motions(stages, trial.portrait, state, chunks_of(stages, drive), seed)
        rows[f"model, {name}"] = figures(trial, pictures)
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| | whole picture | face |", "|---|---|---|"]
    lines += [f"| {name} | {row['psnr_db']:.1f} dB | {row['psnr_face_db']:.1f} dB |" for name, row in rows.items()]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    result = argparse.ArgumentParser(prog="python -m training.causes", description=(__doc__ or "").splitlines()[0])
    result.add_argument("--weights", default="tiny", help="weights folder, or tiny (default)")
    result.add_argument("--identities", type=int, default=4, help="how many trials (default 4)")
    result.add_argument("--seconds", type=float, default=1.5, help="length of each (default 1.5)")
    result.add_argument("--seed", type=int, default=0, help="which people and motions (default 0)")
    result.add_argument("--json", action="store_true", help="print only the JSON")
    result.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    result.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parser().parse_args(argv)
    try:
        if args.identities < 1 or args.seconds <= 0 or args.seed < 0 or args.threads < 1:
            raise BadConfig("--identities and --threads must be at least 1, --seconds above 0, --seed 0 or more")
        stages = load_stages(args.weights, device=args.device, num_threads=args.threads)
        num_frames = whole_chunks(stages, args.seconds)
        bar = tqdm(range(args.identities), desc="causes", unit="identity")
        trials = [causes(stages, args.seed, index, num_frames) for index in bar]
    except UserError as error:
        print(f"error ({error.code}): {error}", file=sys.stderr)
        return 2
    rows = {name: means([trial[name] for trial in trials]) for name in trials[0]}
    print(json.dumps(rounded(rows)) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
