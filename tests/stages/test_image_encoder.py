"""The image encoder against transformers' CLIPVisionModelWithProjection."""

import pytest
import torch

from stages.config import ImageEncoderConfig
from stages.networks.image_encoder import ImageEncoder

SMALL = ImageEncoderConfig(
    image_px=20, patch_px=5, hidden_dim=12, intermediate_dim=28, num_layers=3, num_heads=2, projection_dim=7
)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_equals_transformers_with_the_same_weights(hidden_act: str):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = ImageEncoderConfig(**{**vars(SMALL), "hidden_act": hidden_act})
    twin = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.hidden_dim,
            intermediate_size=config.intermediate_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_px,
            patch_size=config.patch_px,
            projection_dim=config.projection_dim,
            hidden_act=hidden_act,
            layer_norm_eps=config.norm_eps,
        )
    ).eval()
    torch.manual_seed(0)
    encoder = ImageEncoder(config).eval()
    twin.load_state_dict(encoder.state_dict(), strict=True)
    pixels = torch.randn(3, 3, 20, 20)
    embeds = encoder(pixels)
    assert embeds.shape == (3, 7)
    torch.testing.assert_close(embeds, twin(pixels).image_embeds, rtol=0, atol=1e-5)
