"""The messages of `/v1/stream`, protocol 1: what may be said, checked before anything is done with it.

`docs/protocol.md` is this file for people. Called by `serving.session` (the server's side) and `serving.client`. Pure:
no I/O, no torch, no Ray. Every size is capped before it is parsed, every value is typed, bounded and finite.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import from_json

from stages.errors import UserError

PROTOCOL = 1
MAX_MESSAGE_BYTES = 4 * 2**20
"""Below the 16 MiB at which Serve's transport closes the socket without a word."""
MAX_HEADER_BYTES = 8 * 2**10
MAX_NUM_REFUSED = 10
"""A live session survives so many refused messages; a lossless one none, since nothing may be missing from it."""

Count = Annotated[int, Field(ge=0, le=2**53)]
Milliseconds = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=2000)]
Name = Annotated[str, Field(max_length=64)]
Counts = Annotated[dict[Name, Count], Field(max_length=32)]
Times = Annotated[dict[Name, Milliseconds], Field(max_length=32)]
Mode = Literal["live", "lossless"]
CodecName = Literal["jpeg", "png", "webp", "raw"]

STRICT = ConfigDict(strict=True, extra="forbid")


class ProtocolError(UserError):
    """The other side said something it may not say. Codes: the table in docs/protocol.md."""

    code = "bad_header"


ENDING_CODES = frozenset(
    {"not_hello", "bad_version", "too_large", "no_credit", "flooding", "idle", "stalled", "busy", "bad_portrait"}
)
"""Errors that end the session at once; the others cost one message."""


@dataclass(frozen=True, config=STRICT)
class Hello:
    """Client, first: who is to move. The payload is a portrait file, unless `portrait` names a bundled one."""

    protocol: int
    portrait: Name | None = None
    mode: Mode = "live"
    codec: CodecName = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    resume: Name | None = None
    """`token` of an earlier live session: its picture goes on where it can, otherwise a new session begins."""
    type: Literal["hello"] = "hello"


@dataclass(frozen=True, config=STRICT)
class DrivingFrame:
    """Client: one camera picture, encoded with the session's codec. `width` and `height` belong to raw pixels only."""

    seq: Count
    capture_ms: Milliseconds
    width: Annotated[int, Field(ge=1, le=2**16)] | None = None
    height: Annotated[int, Field(ge=1, le=2**16)] | None = None
    type: Literal["frame"] = "frame"


@dataclass(frozen=True, config=STRICT)
class Shown:
    """Client: how many output frames it has shown since `ready`, the transition's included."""

    count: Count
    shown_ms: Milliseconds | None = None
    """When the last of them was shown, on the clock of `capture_ms`."""
    type: Literal["shown"] = "shown"


@dataclass(frozen=True, config=STRICT)
class Ping:
    """Client: are you there? Also keeps a session without frames for a while."""

    client_ms: Milliseconds
    rtt_ms: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    """How long the last pong took, there and back: lets the server tell the clocks' offset from the way."""
    type: Literal["ping"] = "ping"


@dataclass(frozen=True, config=STRICT)
class End:
    """Client: no more frames; send what is still inside, then your own end."""

    type: Literal["end"] = "end"


@dataclass(frozen=True, config=STRICT)
class Bye:
    """Client: stop now."""

    type: Literal["bye"] = "bye"


@dataclass(frozen=True, config=STRICT)
class Ready:
    """Server: the portrait is accepted, frames may come."""

    session: Text
    size_px: Count
    """Side of the square that frames are cropped and resized to, and of the output."""
    chunk_frames: Count
    num_levels: Count
    delay_frames: Count
    """Structural delay: so many later frames enter before a frame's output leaves; also the transition's length."""
    fps: Annotated[float, Field(gt=0, le=1000)]
    """A camera rate above which frames are only dropped."""
    credit: Count
    """Lossless: frames that may be sent before the first `credit` message."""
    max_message_bytes: Count
    max_bytes_per_s: Count
    idle_timeout_s: Annotated[float, Field(gt=0, le=1e6)]
    token: Name | None = None
    """For `resume` in the hello of another connection; null in lossless sessions. A secret: it is the session."""
    resumed: bool = False
    """Whether this is the earlier session that the hello named."""
    protocol: int = PROTOCOL
    type: Literal["ready"] = "ready"


@dataclass(frozen=True, config=STRICT)
class Credit:
    """Server, lossless: frames that may have been sent since `ready`, all in all."""

    frames: Count
    type: Literal["credit"] = "credit"


@dataclass(frozen=True, config=STRICT)
class OutputFrame:
    """Server: one picture, encoded with the session's codec."""

    index: Count
    """Counts all output frames of the session, from 0."""
    seq: Count | None
    """Of the driving frame it belongs to; null in the transition from the portrait to the first driving frame."""
    capture_ms: Milliseconds | None
    """Of that driving frame, as the client stamped it."""
    no_face: bool
    """The driving frame had no usable face, so the last motion was held."""
    server_ms: Milliseconds | None
    """From that driving frame's arrival to this message."""
    stage_ms: Times
    """Work per stage for the chunk that just left the pipeline, and `<stage>_wait` for its queueing where known."""
    dropped: Counts
    """Driving frames dropped since `ready`, by reason."""
    width: Count
    height: Count
    type: Literal["frame"] = "frame"


@dataclass(frozen=True, config=STRICT)
class Pong:
    """Server: answer to `ping`, with its own clock."""

    client_ms: Milliseconds
    server_ms: Milliseconds
    type: Literal["pong"] = "pong"


@dataclass(frozen=True, config=STRICT)
class Notice:
    """Server: something a person should know; nothing to do."""

    code: Name
    message: Text
    type: Literal["notice"] = "notice"


@dataclass(frozen=True, config=STRICT)
class Queued:
    """Server: all places are taken; wait, `ready` will come. Said again when the position changes."""

    position: Count
    """1: the next place that becomes free."""
    estimate_s: Annotated[float, Field(ge=0, le=1e9)]
    """How long it may take, by how long people have stayed lately."""
    type: Literal["queued"] = "queued"


@dataclass(frozen=True, config=STRICT)
class Recovered:
    """Server: after the notice `recovering`, the picture goes on."""

    parts_ms: Times
    """What the interruption was made of, as the server saw it: `restart` (a new process), `imports`, `weights`,
    `restore` (the session's state into it), `first_frame` (the next decoded chunk). Zero what a stand-in had ready."""
    type: Literal["recovered"] = "recovered"


@dataclass(frozen=True, config=STRICT)
class Error:
    """Server: something went wrong. After a fatal one the socket closes."""

    code: Name
    message: Text
    fatal: bool
    retry_s: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """When it may be worth another try."""
    type: Literal["error"] = "error"


@dataclass(frozen=True, config=STRICT)
class Ended:
    """Server, last: the session's statistics. frames_received = frames_used + the sum of dropped."""

    frames_received: Count
    frames_used: Count
    frames_sent: Count
    """Output frames, the transition's included."""
    dropped: Counts
    type: Literal["end"] = "end"


ClientMessage = Hello | DrivingFrame | Shown | Ping | End | Bye
ServerMessage = Ready | Credit | OutputFrame | Pong | Notice | Queued | Recovered | Error | Ended
_CLIENT: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])
_SERVER: TypeAdapter[ServerMessage] = TypeAdapter(Annotated[ServerMessage, Field(discriminator="type")])
_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def pack(message: ClientMessage | ServerMessage, payload: bytes | memoryview = b"") -> str | bytes:
    """A message for the wire: text without a payload, else one binary envelope (see `split`)."""
    header: bytes = _ANY.dump_json(message)
    if not payload:
        return header.decode()
    return b"".join((struct.pack(">I", len(header)), header, payload))


def parse_client(data: str | bytes) -> tuple[ClientMessage, memoryview]:
    """What a client sent: the message and its payload. Raises ProtocolError."""
    header, payload = split(data)
    return _validate(_CLIENT, header), payload


def parse_server(data: str | bytes) -> tuple[ServerMessage, memoryview]:
    """What the server sent: the message and its payload. Raises ProtocolError."""
    header, payload = split(data)
    return _validate(_SERVER, header), payload


def split(data: str | bytes) -> tuple[bytes, memoryview]:
    """The JSON header and the payload of a message, every size checked. Raises ProtocolError.

    Text is the header alone; binary is a big-endian uint32 header length, the header, the payload.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message has {len(data)} bytes, at most {MAX_MESSAGE_BYTES} are taken", "too_large")
    if isinstance(data, str):
        header, payload = data.encode("utf-8", "replace"), memoryview(b"")
    else:
        length = struct.unpack_from(">I", data)[0] if len(data) >= 4 else -1
        if not 0 <= length <= len(data) - 4:
            raise ProtocolError("a binary message must start with its header's length as a big-endian uint32")
        header, payload = data[4 : 4 + length] if length <= MAX_HEADER_BYTES else b"", memoryview(data)[4 + length :]
    if not 0 < len(header) <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header must have 1 to {MAX_HEADER_BYTES} bytes")
    return header, payload


def _validate(adapter: TypeAdapter[Any], header: bytes) -> Any:
    try:
        fields = from_json(header, allow_inf_nan=False)
    except ValueError as error:
        raise ProtocolError(f"a header is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ProtocolError("a header must be a JSON object")
    # The version comes first: another version's hello may have keys that this one does not know.
    if fields.get("type") == "hello" and fields.get("protocol") != PROTOCOL:
        raise ProtocolError(
            f"protocol {repr(fields.get('protocol'))[:20]} is not spoken here: send protocol {PROTOCOL}", "bad_version"
        )
    try:
        return adapter.validate_json(header)
    except ValidationError as error:
        raise ProtocolError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:64] for part in first["loc"])
    return f"header {where}: {first['msg']}"[:500] if where else first["msg"][:500]
