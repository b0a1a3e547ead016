"""What a pool is made of, and the name that follows from it. No torch, no Ray; used by serving and `cluster`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import stages
from stages.errors import BadConfig

STAGES = ("motion", "reference", "denoise", "decode")
TINY = Path(stages.__file__).parent / "tiny"


@dataclass(frozen=True)
class PoolSettings:
    """Two connections with equal settings share one pool. Raises BadConfig on values that cannot work."""

    weights: str = "tiny"
    """`tiny` (bundled) or a folder."""
    num_threads: int = 0
    """Torch threads per member; 0: `stages.threads.default_num_threads()` of the member's machine."""
    max_batch: int = 4
    """Sessions per call of a stage."""
    target_fps: float = 8.0
    """Frames a second that every session shall get: decides how many are admitted."""
    max_queue: int = 16
    """So many may wait for a place."""
    spare_members: int = 0
    """Members that stand by, loaded, for one that dies."""
    hang_s: float = 20.0
    """A member that does not answer for so long is replaced."""
    lease_s: float = 60.0
    """A pool whose leases have not been renewed for so long removes itself."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    artificial_ms: tuple[tuple[str, float], ...] = ()
    """(stage, ms): no stage computes, each sleeps (0 if not named). For measuring the overlap, and nothing else."""

    def __post_init__(self) -> None:
        unknown = [stage for stage, _ in self.artificial_ms if stage not in STAGES]
        wrong = [
            (self.num_threads < 0, f"num_threads {self.num_threads} is negative; 0 chooses by itself"),
            (self.max_batch < 1, f"max_batch {self.max_batch} must be at least 1"),
            (self.lease_s <= 0, f"lease_s {self.lease_s} must be positive"),
            (self.target_fps <= 0, f"target_fps {self.target_fps} must be positive"),
            (self.max_queue < 0, f"max_queue {self.max_queue} is negative; 0 lets nobody wait"),
            (self.spare_members < 0, f"spare_members {self.spare_members} is negative"),
            (self.hang_s <= 0, f"hang_s {self.hang_s} must be positive"),
            (self.device not in ("auto", "cpu", "cuda"), f"device {self.device!r} must be auto, cpu or cuda"),
            (bool(unknown), f"artificial_ms: unknown stage {', '.join(unknown)}; stages are {', '.join(STAGES)}"),
        ]
        for bad, message in wrong:
            if bad:
                raise BadConfig(message)


def pool_name(settings: PoolSettings) -> str:
    """`pool-` and 12 hex digits, the same for equal settings on unchanged weights: changed weights get a new pool."""
    identity = dataclasses.asdict(settings) | {"weights": _weights_identity(weights_folder(settings.weights))}
    return "pool-" + hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def absolute(settings: PoolSettings) -> PoolSettings:
    """The same settings for another working directory: that of a member."""
    if settings.weights == "tiny":
        return settings
    return dataclasses.replace(settings, weights=str(weights_folder(settings.weights)))


def weights_folder(weights: str) -> Path:
    """The folder that `weights` means on this machine."""
    return TINY if weights == "tiny" else Path(weights).expanduser().resolve()


def _weights_identity(folder: Path) -> list[tuple[str, int, int]]:
    """(path, bytes, modification time) of every file: gigabytes of weights are not read for a name.

    Machines of one cluster must therefore see one shared folder, or copies that keep the times.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files] or [(str(folder), 0, 0)]
