"""The decode stage: clean latents to frames. Called by the members and the in-process pipeline; weights only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from stages.config import ModelConfig
from stages.groups import groups
from stages.messages import CleanChunk, Pixels
from stages.networks.vae import Vae


@dataclass(frozen=True)
class DecodeStage:
    """The VAE's decoder."""

    config: ModelConfig
    vae: Vae

    @torch.inference_mode()
    def run(self, chunks: Sequence[CleanChunk]) -> list[Pixels]:
        """One chunk of latents of each of several sessions to uint8 (f, size, size, 3)."""
        parameter = next(self.vae.parameters())
        return [pixels for part in groups(len(chunks), parameter) for pixels in self._run_together(chunks[part])]

    def _run_together(self, chunks: Sequence[CleanChunk]) -> list[Pixels]:
        frames = self.decode(torch.from_numpy(np.concatenate([chunk.latents for chunk in chunks])))
        # Truncated, not rounded, as the method's authors write their frames.
        pixels = (frames * 255).to(torch.uint8).cpu().numpy()
        return np.split(pixels, np.cumsum([len(chunk.latents) for chunk in chunks])[:-1])

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (n, c, h, w) to frames (n, size, size, 3) in [0, 1] (specification, section 8)."""
        images = self.vae.decode(latents.to(next(self.vae.parameters()))).float()
        return rearrange((images / 2 + 0.5).clamp(0, 1), "n c h w -> n h w c").contiguous()
