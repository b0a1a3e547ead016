"""The whole online algorithm against golden j: every call's boxes, motion, latents, keyframe decisions and frames.

The stages run as the members run them; only the noise is the authors'. The 512 set has nothing patched.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from stages.config import ModelConfig
from stages.images import detector_frames, signed
from stages.keypoints import boxes, pose_from_raw, posed_keypoints
from stages.messages import Keyframe, MotionChunk
from stages.pipeline import STAGE_NETWORKS, Stages, load_stages
from stages.window import bank_distance

RUNS = [pytest.param(name, marks=pytest.mark.golden(name)) for name in ("j_online", "j_online_native512")]


@dataclass(frozen=True)
class Run:
    """One stored run, and the stages that repeat it."""

    stages: Stages
    stored: dict[str, Tensor]
    facts: dict[str, Any]
    folder: Path

    @property
    def config(self) -> ModelConfig:
        return self.stages.config

    def frames(self, call: int) -> np.ndarray:
        chunk = self.config.window.chunk_frames
        numbers = range(call * chunk, (call + 1) * chunk)
        folder = self.folder / f"frames_{self.facts['size']}"
        return np.stack([np.asarray(Image.open(folder / f"{number:03d}.png")) for number in numbers])

    def noise(self, draw: int) -> Tensor:
        return rearrange(self.stored[f"noise.{draw:03d}"], "1 c f h w -> f c h w")

    def at(self, call: int, name: str) -> Tensor | None:
        return self.stored.get(f"c{call:02d}.{name}")


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, golden, weights_dir: Path, set_dir: Path) -> Run:
    facts = json.loads((set_dir / "goldens" / f"{request.param}.json").read_text())
    stages = load_stages(str(weights_dir), STAGE_NETWORKS, "cpu", torch.get_num_threads())
    config = dataclasses.replace(stages.config, size_px=facts["size"])
    resized = {stage: dataclasses.replace(getattr(stages, stage), config=config) for stage in STAGE_NETWORKS}
    return Run(Stages(config, **resized), golden(request.param), facts, set_dir / "goldens")


def assert_within(ours: Tensor | np.ndarray, theirs: Tensor | None, atol: float, what: str) -> None:
    if theirs is not None:
        difference = (torch.as_tensor(ours) - theirs).abs().max().item()
        assert difference <= atol, f"{what}: {difference:.2e} > {atol:.0e}"


def assert_latents(ours: Tensor, theirs: Tensor | None, what: str) -> None:
    """Latents of the synthetic network grow: they are compared relative to their standard deviation."""
    if theirs is not None:
        assert_within(ours, theirs, 2e-4 * theirs.std().item(), what)


def frames_last(stored: Tensor | None) -> Tensor | None:
    return None if stored is None else rearrange(stored, "1 c f h w -> f c h w")


def check_motion(run: Run, call: int, chunk: MotionChunk) -> None:
    """Boxes, keypoints and tokens of one call."""
    extractor = run.stages.motion.keypoint_extractor
    pictures = detector_frames(signed(run.frames(call)), run.config.keypoints.image_px)
    driving = posed_keypoints(pose_from_raw(extractor(pictures)))
    found = boxes(driving, run.facts["size"], run.config.keypoints)
    assert torch.equal(found, run.stored[f"c{call:02d}.boxes"])
    assert_within(chunk.keypoints, run.at(call, "mot_bbox_param"), 1e-5, "keypoints")
    tokens = run.stored[f"c{call:02d}.motion"][0, -run.config.window.chunk_frames :]
    assert_within(chunk.tokens[-run.config.window.chunk_frames :], tokens, 5e-5, "motion tokens")


def check_decision(run: Run, call: int, before: Any, result: Any) -> None:
    """The keyframe rule's distances and both of its outcomes."""
    facts = run.facts["calls"][call]
    assert (len(result.state.bank) > len(before.bank)) == bool(facts["idx_to_add"])
    assert len(result.state.bank) == facts["bank_size_after"]
    assert (result.keyframe is not None) == facts["kv_appended"]
    assert result.state.num_keyframes == facts["num_khf"]
    if facts["dist_first"] is not None:
        oldest = rearrange(before.tokens[0], "t d -> 1 (t d)")
        assert abs(bank_distance(oldest, before.bank).item() - min(facts["dist_first"])) < 1e-2


def check_frames(run: Run, call: int, frames: Tensor) -> None:
    assert_within(frames, run.at(call, "video"), 1e-4, "video")
    every_fourth = run.at(call, "video_sub4")
    assert_within(frames[:, ::4, ::4], None if every_fourth is None else every_fourth.float(), 1e-3, "video_sub4")


def test_online_run(run: Run):
    stages, stored = run.stages, run.stored
    portrait = np.asarray(Image.open(next(run.folder.glob("ref_*.png"))).convert("RGB"))
    features = stages.reference.open(portrait)
    assert_within(features.token, stored["encoder_hidden_states"][0, 0], 1e-4, "image token")
    assert_within(features.latent, stored["ref_image_latents"][0], 1e-4, "portrait latent")
    state = stages.motion.open(portrait)
    window = stages.denoise.open(features, state.portrait_tokens, seed=0, noise=run.noise(0))
    for call in range(run.facts["ncalls"]):
        [(state, chunk)] = stages.motion.run([state], [run.frames(call)])
        check_motion(run, call, chunk)
        before = window
        [result] = stages.denoise.steps([window], [chunk], [run.noise(call + 1)])
        window = result.state
        assert_within(result.prediction, frames_last(run.at(call, "noise_pred")), 2e-4, f"noise_pred {call}")
        assert_latents(result.clean, scaled(run, call), f"vae_in {call}")
        if call + 1 < run.facts["ncalls"]:
            entered = frames_last(run.at(call + 1, "latents_in"))
            assert_latents(window.latents, None if entered is None else entered[: len(window.latents)], "latents_in")
        check_decision(run, call, before, result)
        check_frames(run, call, stages.decode.decode(result.clean))
        if result.keyframe is not None:
            assert_latents(result.keyframe, stored[f"c{call:02d}.keyframe_latent"][0], "keyframe latent")
            message = Keyframe(result.keyframe.numpy(), features.token)
            window = stages.denoise.add_keyframe(window, stages.reference.keyframe(message))


def scaled(run: Run, call: int) -> Tensor | None:
    """`vae_in` as our latents: the golden is already divided by the VAE's scaling factor."""
    stored = run.at(call, "vae_in")
    return None if stored is None else stored * run.config.vae.scaling_factor
