"""All settings of the server in one class: environment (`PERSONALIVE_*`), `serve run serving:app key=value`, and YAML.

Values given to `serve run` or in the YAML's `args` win over the environment. Called by `serving.application`.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "PERSONALIVE_"


class Settings(BaseSettings):
    """What can be set. An unknown key or an impossible value is refused with a sentence."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    weights: str = "tiny"
    """`tiny` (bundled) or a folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Torch threads per member; 0 chooses by the machine."""
    max_batch: Annotated[int, Field(ge=1, le=64)] = 4
    """Sessions per call of a stage."""
    target_fps: Annotated[float, Field(gt=0, le=1000)] = 8.0
    """Frames a second that every session shall get: as many people are admitted as that allows, the next ones wait."""
    max_queue: Annotated[int, Field(ge=0, le=10_000)] = 16
    """So many may wait for a place; the next one is refused as `busy`."""
    resume_s: Annotated[float, Field(ge=0, le=3600)] = 20.0
    """The place of a live client whose connection broke is kept for so long; it comes back with its token."""
    spare_members: Annotated[int, Field(ge=0, le=64)] = 0
    """Members that stand by with loaded weights, for one that dies: seconds instead of a restart."""
    hang_s: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """A member that does not answer for so long is replaced."""
    lease_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    """The pool removes itself so long after its last ingress replica has gone."""
    num_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    """Ingress replicas."""
    max_sessions: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Per ingress replica; the next one is refused as `busy`."""
    max_chunks_in_flight: Annotated[int, Field(ge=1, le=16)] = 2
    """Per session, between acceptance and decode. Two saturate the stages; each further one adds a chunk of delay."""
    max_input_bytes_per_s: Annotated[int, Field(ge=1000, le=10**12)] = 48_000_000
    """Per session; whoever sends more is closed."""
    max_fps: Annotated[float, Field(gt=0, le=1000)] = 30.0
    """A hint for clients: at higher camera rates frames are only dropped."""
    idle_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 30.0
    """A client that says nothing, or shows nothing of what it gets, for so long is closed."""
    pause_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """A client that lives but brings no frames for so long is closed. Its place it has given to others much earlier."""
    hello_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """Within this a new connection must say hello."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        given = set(values) if isinstance(values, dict) else set()
        known = {PREFIX + name.upper() for name in cls.model_fields}
        in_environment = {name for name in os.environ if name.upper().startswith(PREFIX)} - known
        unknown = sorted((given - set(cls.model_fields)) | in_environment)
        if unknown:
            raise ValueError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(cls.model_fields))}")
        return values

    def with_absolute_weights(self) -> "Settings":
        """The same with `weights` as `tiny` or an absolute path: the members run in another directory, or on another
        machine. Raises ValueError for a relative path that is no folder here."""
        folder = Path(self.weights).expanduser()
        if self.weights == "tiny" or folder.is_absolute():
            return self.model_copy(update={"weights": self.weights if self.weights == "tiny" else str(folder)})
        if not folder.is_dir():
            raise ValueError(f"weights={self.weights} is no folder in {Path.cwd()}: give its absolute path, or tiny")
        return self.model_copy(update={"weights": str(folder.resolve())})
