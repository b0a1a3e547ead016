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
    """The VAE's decoder, and for detail all of it."""

    config: ModelConfig
    vae: Vae

    @torch.inference_mode()
    def run(self, chunks: Sequence[CleanChunk]) -> list[Pixels]:
        """One chunk of each of several sessions to uint8 (f, size, size, 3)."""
        parameter = next(self.vae.parameters())
        return [pixels for part in groups(len(chunks), parameter) for pixels in self._run_together(chunks[part])]

    def _run_together(self, chunks: Sequence[CleanChunk]) -> list[Pixels]:
        moved = [chunk.moved for chunk in chunks if chunk.moved is not None]
        frames = self.decode(
            torch.from_numpy(np.concatenate([chunk.latents for chunk in chunks])),
            torch.from_numpy(np.concatenate(moved)) if moved else None,
        )
        # Truncated, not rounded, as the method's authors write their frames.
        pixels = (frames * 255).to(torch.uint8).cpu().numpy()
        return np.split(pixels, np.cumsum([len(chunk.latents) for chunk in chunks])[:-1])

    @torch.inference_mode()
    def decode(self, latents: Tensor, moved: Tensor | None = None) -> Tensor:
        """latents (n, c, h, w) to frames (n, size, size, 3) in [0, 1] (specification, section 8), with detail of the
        moved portrait (n, 3, size, size), where it is given."""
        images = self.vae.decode(latents.to(next(self.vae.parameters()))).float()
        if moved is not None:
            images = images + self.config.vae.kept_detail * self.vae.lost(moved.to(images) * 2 - 1)
        return rearrange((images / 2 + 0.5).clamp(0, 1), "n c h w -> n h w c").contiguous()
