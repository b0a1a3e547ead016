"""Perceptual distance, as a loss of the phases and as a measure of `training.evaluate`.

`lpips` is the usual one (Zhang et al. 2018, VGG16, version 0.1); its weights are given by path, none are bundled.
Without them `substitute` compares what the trunk of the probes (`training.probes`) sees: the same distance of
unit-normalised features, with equal weights. They know the drawn world's eyes, mouths, skins and outlines and nothing
else, and its figures cannot be compared with those of LPIPS.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.errors import BadWeights
from stages.messages import Pixels
from stages.weights import load_tensors
from training.probes import BUNDLED, CHANNELS, load_probes, signed_crops

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Convolutions between two poolings; features are taken after each group."""
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""From [-1, 1] to what VGG16 was trained on."""


class Vgg16(nn.Module):
    """VGG16 without its classifier: (n, 3, h, w) in [-1, 1] to five feature maps, at 1 to 1/16 of the sides.

    Parameters are named as in torchvision's file (`features.0.weight`, ...).
    """

    def __init__(self, widths: tuple[tuple[int, ...], ...] = VGG16_WIDTHS):
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE).view(1, 3, 1, 1), persistent=False)
        layers: list[nn.Module] = []
        before = 3
        for group in widths:
            for width in group:
                layers += [nn.Conv2d(before, width, 3, 1, 1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x, found = (pictures - self.shift) / self.scale, []
        for layer in list(self.features)[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]


class Perceptual(nn.Module):
    """Distances (n,) of pictures (n, 3, h, w) in [-1, 1]; differentiable in both, never trained itself.

    `features` gives feature maps; `weights` holds one (channels,) per map: how much each channel's difference counts.
    """

    def __init__(self, features: nn.Module, weights: list[Tensor]):
        super().__init__()
        self.features = features
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in weights)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Does nothing: a loss has no training mode, and its normalisation must not follow the pictures."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        maps = self.features(torch.cat([a, b]))
        return torch.stack([_distance(x, weight) for x, weight in zip(maps, self.weights, strict=True)]).sum(0)


def _distance(both: Tensor, weight: Tensor) -> Tensor:
    unit = both * (both.square().sum(1, keepdim=True) + 1e-10).rsqrt()
    a, b = unit.chunk(2)
    return torch.einsum("nchw,c->nhw", (a - b).square(), weight.to(both.dtype)).mean((1, 2))


def substitute(path: Path = BUNDLED) -> Perceptual:
    """The distance without given weights: the probes' four feature maps, equally weighted. Raises BadWeights."""
    trunk = load_probes(path).network.trunk
    trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Perceptual(trunk, [torch.full((width,), 1 / len(CHANNELS)) for width in CHANNELS])


def lpips(vgg: Path, lins: Path, widths: tuple[tuple[int, ...], ...] = VGG16_WIDTHS) -> Perceptual:
    """LPIPS from torchvision's VGG16 weights and the `lpips` package's linear layers. Raises BadWeights."""
    network = Vgg16(widths)
    kept = {key: value for key, value in _read(vgg).items() if key.startswith("features.")}
    linear = _read(lins)
    try:
        network.load_state_dict(kept)
        weights = [linear[f"lin{index}.model.1.weight"].flatten() for index in range(len(widths))]
    except (RuntimeError, KeyError) as error:
        raise BadWeights(
            f"{vgg} and {lins} are not LPIPS of VGG16: give torchvision's vgg16 file and lpips' weights/v0.1/vgg.pth"
        ) from error
    if [len(weight) for weight in weights] != [group[-1] for group in widths]:
        raise BadWeights(f"{lins} weights other layers than VGG16's: give lpips' weights/v0.1/vgg.pth")
    return Perceptual(network, weights)


def load_perceptual(vgg: Path | None = None, lins: Path | None = None) -> Perceptual:
    """`lpips` where both files are given, otherwise the substitute. Raises BadWeights."""
    if (vgg is None) != (lins is None):
        raise BadWeights("LPIPS needs two files: VGG16's weights and the linear layers")
    return lpips(vgg, lins) if vgg and lins else substitute()


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BadWeights(f"{path} holds no weights that can be read: give a .pth or .safetensors file") from error
    if not isinstance(loaded, dict):
        raise BadWeights(f"{path} holds no table of weights: give a .pth or .safetensors file")
    return loaded


@torch.inference_mode()
def picture_distances(perceptual: Perceptual, a: Pixels, b: Pixels, batch: int = 8) -> NDArray[np.float32]:
    """Distances (n,) of uint8 pictures (n, h, w, 3)."""
    found = [
        perceptual(signed_crops(torch.from_numpy(a[i : i + batch])), signed_crops(torch.from_numpy(b[i : i + batch])))
        for i in range(0, len(a), batch)
    ]
    return torch.cat(found).numpy()
