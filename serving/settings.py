"""All settings of the server in one class: environment (`PERSONALIVE_*`), `serve run serving:app key=value`, and YAML.

Values given to `serve run` or in the YAML's `args` win over the environment. Called by `serving.application`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What can be set. An unknown key or an impossible value is refused with a sentence."""

    model_config = SettingsConfigDict(env_prefix="PERSONALIVE_", extra="forbid", frozen=True)

    weights: str = "tiny"
    """`tiny` (bundled) or a folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads per member; 0 chooses by the machine."""
    max_batch: Annotated[int, Field(ge=1)] = 4
    """Sessions per denoiser call."""
    lease_s: Annotated[float, Field(gt=0)] = 60.0
    """The pool removes itself so long after its last ingress replica has gone."""
    num_replicas: Annotated[int, Field(ge=1)] = 1
    """Ingress replicas."""
    max_sessions: Annotated[int, Field(ge=1)] = 64
    """Per ingress replica; the next one is refused as `busy`."""
    max_chunks_in_flight: Annotated[int, Field(ge=1, le=16)] = 2
    """Per session, between acceptance and decode. Two saturate the stages; each further one adds a chunk of delay."""
    max_input_bytes_per_s: Annotated[int, Field(ge=1000)] = 48_000_000
    """Per session; whoever sends more is closed."""
    max_fps: Annotated[float, Field(gt=0, le=1000)] = 30.0
    """A hint for clients: at higher camera rates frames are only dropped."""
    idle_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A client that says nothing, or shows nothing of what it gets, for so long is closed."""
    hello_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Within this a new connection must say hello."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        unknown = sorted(set(values) - set(cls.model_fields)) if isinstance(values, dict) else []
        if unknown:
            raise ValueError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(cls.model_fields))}")
        return values

    @property
    def weights_path(self) -> str:
        """`tiny`, or the folder as an absolute path: the members run in another directory."""
        return self.weights if self.weights == "tiny" else str(Path(self.weights).expanduser().resolve())
