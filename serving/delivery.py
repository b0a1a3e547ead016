"""What a session gives out: which frames a result shows, when each is due, what the client has seen, what it may send.

Called by `serving.session`, which does the I/O. Nothing here waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from serving import flow, pacing
from serving.flow import Progress, Stamp
from serving.protocol import Mode, ProtocolError
from stages import chunks
from stages.config import WindowConfig
from stages.messages import Pixels


class Decoded(Protocol):
    """One result of the pipeline; `cluster.messages.DecodedChunk` is one."""

    @property
    def frames(self) -> Pixels:
        """(chunk_frames, s, s, 3) of the driving chunk `num_levels - 1` calls earlier."""

    @property
    def no_face(self) -> Sequence[bool]:
        """Per driving frame of this call."""

    @property
    def stage_ms(self) -> Mapping[str, float]:
        """Work per stage."""


@dataclass(frozen=True)
class Output:
    """A picture that waits for its turn to be sent."""

    rgb: Pixels
    source: Stamp | None
    """The driving frame it belongs to; None: transition."""
    no_face: bool
    stage_ms: Mapping[str, float]
    due_s: float


class Delivery:
    """The chunks of one session between acceptance and the client's receipt."""

    def __init__(self, window: WindowConfig, mode: Mode, max_in_flight: int):
        self.num_sent = 0
        self.pace = pacing.Pace()
        self._window, self._mode, self._max_in_flight = window, mode, max_in_flight
        self._progress = Progress()
        self._sources: deque[tuple[Sequence[Stamp], Sequence[bool]]] = deque()
        self._num_planned = 0
        self._num_shown = 0
        self._unshown: deque[int] = deque()
        self._unshown_captures: deque[float | None] = deque()
        self._owing_since_s: float | None = None

    @property
    def may_accept(self) -> bool:
        """Whether one more chunk may enter the pipeline now."""
        return self._progress.accepted < flow.num_allowed_chunks(self._progress, self._max_in_flight)

    @property
    def credit(self) -> int:
        """Frames that a lossless client may have sent by now."""
        return flow.num_allowed_chunks(self._progress, self._max_in_flight) * self._window.chunk_frames

    @property
    def owes_output(self) -> bool:
        """Whether the client waits for us: chunks are in the pipeline, or pictures have not been sent."""
        return self._progress.accepted > self._progress.decoded or self._num_planned > self.num_sent

    def accept(self) -> None:
        """One more chunk has entered."""
        self._progress = replace(self._progress, accepted=self._progress.accepted + 1)

    def decoded(self, stamps: Sequence[Stamp], result: Decoded, now_s: float) -> list[Output]:
        """The call that these driving frames entered with has come back: the pictures to send, none for padding.

        `stamps` has fewer than `chunk_frames` where padding filled the call.
        """
        number = self._progress.decoded
        self._progress = replace(self._progress, decoded=number + 1)
        self._sources.append((stamps, result.no_face))
        outputs = self._outputs(number, result, self._due_s(now_s))
        self._num_planned += len(outputs)
        self._unshown.append(self._num_planned)
        self._count_shown_chunks()
        return outputs

    def sent(self, output: Output, now_s: float) -> None:
        """One more output frame has been sent."""
        self.num_sent += 1
        self._unshown_captures.append(None if output.source is None else output.source.capture_ms)
        self._owing_since_s = now_s if self._owing_since_s is None else self._owing_since_s

    def shown(self, count: int, now_s: float) -> list[float | None]:
        """The client's receipt for `count` output frames, all in all. Raises ProtocolError `bad_receipt`.

        Returns when the newly shown ones were captured, on the client's clock; None for those of the transition.
        """
        if not self._num_shown <= count <= self.num_sent:
            told = f"{count} output frames reported shown, after {self._num_shown}, of {self.num_sent} sent"
            raise ProtocolError(f"{told}: count every one once", "bad_receipt")
        if count > self._num_shown:
            self._owing_since_s = now_s if count < self.num_sent else None
        captures = [self._unshown_captures.popleft() for _ in range(count - self._num_shown)]
        self._num_shown = count
        self._count_shown_chunks()
        return captures

    def owing_s(self, now_s: float) -> float:
        """For how long the client has shown nothing of what it was sent."""
        return 0.0 if self._owing_since_s is None else now_s - self._owing_since_s

    def _count_shown_chunks(self) -> None:
        while self._unshown and self._unshown[0] <= self._num_shown:
            self._unshown.popleft()
            self._progress = replace(self._progress, shown=self._progress.shown + 1)

    def _due_s(self, now_s: float) -> list[float]:
        num_frames = self._window.chunk_frames
        self.pace, due_s = pacing.plan_chunk(self.pace, now_s, num_frames)
        return due_s if self._mode == "live" else [now_s] * num_frames

    def _outputs(self, number: int, result: Decoded, due_s: list[float]) -> list[Output]:
        # A result shows an earlier chunk than the one that entered with it.
        if chunks.source_chunk(number, self._window.num_levels) is None:
            pairs = zip(result.frames, due_s, strict=True)
            return [Output(rgb, None, False, result.stage_ms, due) for rgb, due in pairs]
        stamps, no_face = self._sources.popleft()
        real = zip(stamps, result.frames, no_face, due_s, strict=False)
        return [Output(rgb, stamp, missing, result.stage_ms, due) for stamp, rgb, missing, due in real]
