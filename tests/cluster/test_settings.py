import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.settings import PoolSettings, pool_name
from stages.errors import BadConfig


def folder(path: Path, text: str = "weights") -> Path:
    path.mkdir(exist_ok=True)
    (path / "vae.safetensors").write_text(text)
    os.utime(path / "vae.safetensors", ns=(5, 5))
    return path


def test_equal_settings_share_a_pool(tmp_path: Path) -> None:
    weights = str(folder(tmp_path))
    assert pool_name(PoolSettings(weights)) == pool_name(PoolSettings(weights + "/."))


@pytest.mark.parametrize("other", [{"max_batch": 2}, {"num_threads": 1}, {"artificial_ms": (("decode", 5.0),)}])
def test_other_settings_have_a_pool_of_their_own(other: dict) -> None:
    assert pool_name(PoolSettings(**other)) != pool_name(PoolSettings())


def test_changed_weights_have_a_pool_of_their_own(tmp_path: Path) -> None:
    settings = PoolSettings(str(folder(tmp_path)))
    before = pool_name(settings)
    os.utime(tmp_path / "vae.safetensors", ns=(6, 6))
    touched = pool_name(settings)
    folder(tmp_path, "longer weights")
    assert len({before, touched, pool_name(settings)}) == 3


def test_a_folder_that_does_not_exist_has_a_name_too() -> None:
    assert pool_name(PoolSettings("/nowhere")) != pool_name(PoolSettings("/elsewhere"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"num_threads": -1}, "num_threads"),
        ({"lease_s": 0}, "lease_s"),
        ({"device": "tpu"}, "device"),
        ({"artificial_ms": (("paint", 1.0),)}, "paint"),
    ],
)
def test_impossible_values_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        PoolSettings(**values)


def test_settings_are_hashable() -> None:
    assert len({PoolSettings(), PoolSettings(), PoolSettings(max_batch=2)}) == 2


def test_nothing_in_cluster_loads_torch_at_import() -> None:
    code = "import sys, cluster.session, cluster.member, cluster.overlap; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
