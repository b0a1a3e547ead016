"""What a session needs of the pipeline that moves portraits: `cluster.session` is one, without being imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from serving.delivery import Decoded
from stages.config import ModelConfig
from stages.messages import Pixels


class Listener(Protocol):
    """What a stream tells its owner while it waits; `cluster.session.Listener` is the same."""

    async def queued(self, position: int, estimate_s: float) -> None: ...
    async def recovering(self) -> None: ...
    async def recovered(self, parts_ms: Mapping[str, float]) -> None: ...


class Stream(Protocol):
    """A session of the pipeline; `cluster.session.Session` is one."""

    id: str
    num_recoveries: int

    @property
    def is_recovering(self) -> bool: ...

    async def run(self, frames: Pixels, due_s: float | None = None) -> Decoded:
        """Several calls may be in flight; results come in the order of the calls."""

    async def rest(self) -> None: ...
    async def wake(self) -> None: ...
    def park(self, seconds: float) -> None: ...
    async def close(self) -> None: ...


class Pipeline(Protocol):
    """Opens streams; `cluster.session.Pool` is one."""

    config: ModelConfig

    async def open(self, portrait: Pixels, seed: int, session: str, listener: Listener) -> Stream: ...
    async def resume(self, session: str, portrait: Pixels, listener: Listener) -> Stream | None: ...
