"""Perceptual distance: a distance, a loss, and a reader of the official files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.errors import BadWeights
from training.perceptual import Perceptual, Vgg16, load_perceptual, lpips, picture_distances, substitute

WIDTHS = ((4, 5), (6,), (7, 8, 9))


def pictures(seed: int, n: int = 2, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def write_official(folder: Path) -> tuple[Path, Path]:
    """Random weights under the names of torchvision's and lpips' files."""
    torch.manual_seed(0)
    tensors = dict(Vgg16(WIDTHS).state_dict())
    torch.save(tensors | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg.pth")
    lins = {f"lin{i}.model.1.weight": torch.rand(1, group[-1], 1, 1) for i, group in enumerate(WIDTHS)}
    torch.save(lins, folder / "lins.pth")
    return folder / "vgg.pth", folder / "lins.pth"


@pytest.fixture(scope="module")
def bundled() -> Perceptual:
    return substitute()


def test_it_is_zero_for_equal_pictures_and_symmetric(bundled: Perceptual):
    a, b = pictures(0), pictures(1)
    assert bundled(a, a).tolist() == [0, 0]
    assert torch.allclose(bundled(a, b), bundled(b, a))
    assert (bundled(a, b) > 0.05).all()


def test_it_grows_with_blur(bundled: Perceptual):
    a = pictures(2, 1, 64, 64)
    once = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    more = torch.nn.functional.avg_pool2d(a, 7, 1, 3)
    assert bundled(a, a) < bundled(a, once) < bundled(a, more)


def test_it_is_a_loss_with_finite_gradients_even_for_equal_and_flat_pictures(bundled: Perceptual):
    for start in (pictures(3), torch.zeros(2, 3, 24, 40)):
        a = start.clone().requires_grad_()
        bundled(a, pictures(4)).sum().backward()
        bundled(a, start).sum().backward()
        assert a.grad is not None and torch.isfinite(a.grad).all() and a.grad.abs().sum() > 0


def test_training_never_changes_it(bundled: Perceptual):
    before = {key: value.clone() for key, value in bundled.state_dict().items()}
    bundled.train()
    bundled(pictures(5), pictures(6))
    assert all(torch.equal(before[key], value) for key, value in bundled.state_dict().items())
    assert not any(parameter.requires_grad for parameter in bundled.parameters())


def test_the_official_files_are_read_and_used_layer_by_layer(tmp_path: Path):
    network = lpips(*write_official(tmp_path), WIDTHS)
    a, b = pictures(0), pictures(1)
    expected = torch.zeros(2)
    lins = torch.load(tmp_path / "lins.pth", weights_only=True)
    for index, (x, y) in enumerate(zip(network.features(a), network.features(b), strict=True)):
        x, y = x / x.norm(dim=1, keepdim=True).clamp(min=1e-8), y / y.norm(dim=1, keepdim=True).clamp(min=1e-8)
        expected += ((x - y) ** 2 * lins[f"lin{index}.model.1.weight"]).sum(1).mean((1, 2))
    assert torch.allclose(network(a, b), expected, rtol=1e-3)


def test_vgg16_has_torchvisions_names_and_shapes():
    shapes = {key: tuple(value.shape) for key, value in Vgg16().state_dict().items()}
    assert len(shapes) == 26
    assert shapes["features.0.weight"] == (64, 3, 3, 3)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    maps = Vgg16(WIDTHS)(pictures(0, height=16, width=24))
    assert [tuple(m.shape[1:]) for m in maps] == [(5, 16, 24), (6, 8, 12), (9, 4, 6)]


def test_wrong_files_are_refused_by_name(tmp_path: Path):
    vgg, lins = write_official(tmp_path)
    with pytest.raises(BadWeights, match="torchvision"):
        lpips(lins, vgg, WIDTHS)
    with pytest.raises(BadWeights, match="two files"):
        load_perceptual(vgg)
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(BadWeights, match="empty"):
        lpips(tmp_path / "empty.pth", lins, WIDTHS)
    with pytest.raises(BadWeights, match="absent"):
        lpips(tmp_path / "absent.pth", lins, WIDTHS)


def test_pictures_are_measured_in_batches_as_one_by_one(bundled: Perceptual):
    a, b = (np.random.default_rng(seed).integers(0, 256, (5, 32, 48, 3)).astype(np.uint8) for seed in (0, 1))
    together = picture_distances(bundled, a, b, 2)
    alone = [picture_distances(bundled, x[None], y[None])[0] for x, y in zip(a, b, strict=True)]
    assert together.shape == (5,)
    assert np.allclose(together, alone, atol=1e-5)
