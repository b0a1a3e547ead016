"""What a session takes in: checks driving frames, keeps the recent ones, drops the rest, and forms chunks of them.

Called by `serving.session`, which does the I/O; the choices themselves are in `serving.flow`. Nothing here waits.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from serving import flow
from serving.codec import decode
from serving.flow import ReceivedFrame
from serving.protocol import DrivingFrame, Hello, ProtocolError
from stages import chunks
from stages.config import ModelConfig
from stages.video import square_resize


@dataclass(frozen=True)
class Chunk:
    """Driving frames for one call of the pipeline."""

    frames: list[ReceivedFrame]
    """chunk_frames of them; those behind the first `num_real` are padding at the end of the stream."""
    num_real: int


class Intake:
    """The driving frames of one session between socket and pipeline."""

    def __init__(self, hello: Hello, config: ModelConfig):
        self.num_received = 0
        self.num_used = 0
        self.dropped: Counter[str] = Counter()
        """By reason; num_received = num_used + all of these + those still pending."""
        self._hello, self._config = hello, config
        self._num_frames, self._num_levels = config.window.chunk_frames, config.window.num_levels
        self._pending: list[ReceivedFrame] = []
        self._history: deque[ReceivedFrame] = deque(maxlen=chunks.num_flush_history(self._num_frames, self._num_levels))
        self._has_ended = False
        self._tail: list[ReceivedFrame] | None = None
        self._last_seq = -1
        self._frame_shape: tuple[int, ...] | None = None
        self._interval_s: float | None = None

    @property
    def is_used_up(self) -> bool:
        """Whether the client has ended and the last chunk has been handed out."""
        return self._tail is not None and not self._tail

    def take(
        self, message: DrivingFrame, payload: memoryview, now_s: float, credit: int, period_s: float | None
    ) -> None:
        """Takes a frame in. `credit`: frames a lossless client may have sent; `period_s`: of the pipeline's chunks.

        Raises ProtocolError; the frame then counts as dropped for that reason.
        """
        self.num_received += 1
        try:
            frame = self._checked(message, payload, now_s, credit)
        except ProtocolError as error:
            self.dropped[error.code] += 1
            raise
        if self._pending:
            self._interval_s = flow.mean_interval_s(self._interval_s, now_s - self._pending[-1].received_s)
        self._pending.append(frame)
        if self._hello.mode == "live":
            self._drop_old(now_s, period_s)

    def end(self) -> None:
        """No more frames will come."""
        self._has_ended = True

    def drop_pending(self) -> None:
        """The session stops: what was not used will never be."""
        self.dropped["unused"] += len(self._pending)
        self._pending = []

    def next_chunk(self) -> Chunk | None:
        """The next chunk, if there are frames for it; after the end also the last frames and their padding."""
        if len(self._pending) >= self._num_frames:
            return Chunk(self._pick(), self._num_frames)
        return self._next_tail_chunk() if self._has_ended else None

    def _checked(self, message: DrivingFrame, payload: memoryview, now_s: float, credit: int) -> ReceivedFrame:
        if self._has_ended:
            raise ProtocolError("a frame came after end: end is the last word", "unexpected")
        if self._hello.mode == "lossless" and self.num_received > credit:
            raise ProtocolError(f"{credit} frames have credit, and one more came: wait for credit", "no_credit")
        if message.seq <= self._last_seq:
            raise ProtocolError(f"frame {message.seq} came after {self._last_seq}: seq must increase", "seq_backwards")
        self._last_seq = message.seq
        rgb = decode(payload, self._hello.codec, message.width, message.height)
        self._frame_shape = self._frame_shape or rgb.shape
        if rgb.shape != self._frame_shape:
            sizes = f"{rgb.shape[1]}x{rgb.shape[0]} after {self._frame_shape[1]}x{self._frame_shape[0]}"
            raise ProtocolError(f"a frame is {sizes}: keep one size for a session", "frame_size_changed")
        return ReceivedFrame(square_resize(rgb, self._config.size_px), message.seq, message.capture_ms, now_s)

    def _drop_old(self, now_s: float, period_s: float | None) -> None:
        if period_s is not None and self._interval_s is not None:
            # A camera slower than the pipeline sets the pace, or its chunks would be too old before they are whole.
            period_s = max(period_s, self._interval_s * self._num_frames)
        ring = flow.keep_recent(self._pending, now_s, period_s, self._num_frames)
        self._pending = ring.frames
        self.dropped["stale"] += ring.num_stale
        self.dropped["surplus"] += ring.num_surplus

    def _pick(self) -> list[ReceivedFrame]:
        num = self._num_frames
        if self._hello.mode == "lossless":
            picked, self._pending = self._pending[:num], self._pending[num:]
        else:
            last_ms = self._history[-1].capture_ms if self._history else None
            indices = flow.spread_evenly([frame.capture_ms for frame in self._pending], last_ms, num)
            self.dropped["surplus"] += len(self._pending) - num
            picked, self._pending = [self._pending[index] for index in indices], []
        self._use(picked)
        return picked

    def _use(self, frames: list[ReceivedFrame]) -> None:
        self._history.extend(frames)
        self.num_used += len(frames)

    def _next_tail_chunk(self) -> Chunk | None:
        num_real = 0
        if self._tail is None:
            num_real = len(self._pending)
            self._tail = self._build_tail()
        frames, self._tail = self._tail[: self._num_frames], self._tail[self._num_frames :]
        return Chunk(frames, num_real) if frames else None

    def _build_tail(self) -> list[ReceivedFrame]:
        last, self._pending = self._pending, []
        self._use(last)
        if not self.num_used:
            return []
        oldest = self.num_used - len(self._history)
        padding = chunks.flush_indices(self.num_used, self._num_frames, self._num_levels)
        return last + [self._history[index - oldest] for index in padding]
