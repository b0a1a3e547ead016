"""The reference stage: the portrait, and later keyframes, to the features that the denoiser's attentions read.

Called by the members and the in-process pipeline, once per session and at most `max_keyframes` times more.
Specification, sections 4, 8 and 10 (fuse_reference).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.config import ModelConfig
from stages.images import clip_pixels, pixels_of, portrait_tensor
from stages.messages import Keyframe, Pixels, PortraitFeatures, ReferenceFeatures
from stages.networks.image_encoder import ImageEncoder
from stages.networks.unet import ReferenceUNet
from stages.networks.vae import Vae


@dataclass(frozen=True)
class ReferenceStage:
    """Image encoder, VAE encoder and reference UNet; weights only."""

    config: ModelConfig
    vae: Vae
    image_encoder: ImageEncoder
    reference_unet: ReferenceUNet

    @torch.inference_mode()
    def open(self, portrait: Pixels) -> PortraitFeatures:
        """Encodes a portrait, uint8 (h, w, 3); it is squeezed to a square, so crop it before."""
        parameter = next(self.reference_unet.parameters())
        pixels = clip_pixels(portrait, self.config.image_encoder.image_px)
        token = self.image_encoder(pixels.to(parameter))[0]
        picture = portrait_tensor(portrait, self.config.size_px)
        latent = self.vae.encode(picture.to(parameter))
        return PortraitFeatures(
            features=self._features(latent, token),
            token=token.float().cpu().numpy(),
            latent=latent[0].float().cpu().numpy(),
            pixels=pixels_of(picture[0]) if self.config.pose_guider.shows_portrait else None,
        )

    @torch.inference_mode()
    def keyframe(self, keyframe: Keyframe) -> ReferenceFeatures:
        """Encodes a finished frame's latent."""
        parameter = next(self.reference_unet.parameters())
        latent = torch.from_numpy(keyframe.latent).to(parameter)[None]
        return self._features(latent, torch.from_numpy(keyframe.token).to(parameter))

    def _features(self, latent: Tensor, token: Tensor) -> ReferenceFeatures:
        layers = self.reference_unet(latent, token)
        # Rounded to fp16 whatever the run's precision: the method's authors do, and weights are trained with it.
        return ReferenceFeatures(tuple(layer.half().cpu().numpy() for layer in layers))
