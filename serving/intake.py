"""What a session takes in: checks driving frames, keeps the recent ones, drops the rest, and forms chunks of them.

Called by `serving.session`, which does the I/O; the choices themselves are in `serving.flow`. Frames lie here as they
came, at most `flow.RING_CHUNKS` chunks of them in a live session and as many as have credit in a lossless one, and only
those that a chunk is formed of are decoded. Nothing here waits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from serving import flow
from serving.codec import decode, frame_size
from serving.flow import ReceivedFrame, Stamp
from serving.protocol import CodecName, DrivingFrame, Hello, ProtocolError
from stages import chunks
from stages.config import ModelConfig
from stages.messages import Pixels
from stages.video import square_resize


def decode_frames(frames: Sequence[ReceivedFrame], codec: CodecName, size_px: int) -> list[Pixels | ProtocolError]:
    """The (size_px, size_px, 3) picture of each frame, or why it has none. Slow: for a thread."""
    return [_decode_frame(frame, codec, size_px) for frame in frames]


def _decode_frame(frame: ReceivedFrame, codec: CodecName, size_px: int) -> Pixels | ProtocolError:
    try:
        # A copy, since the square may be a view into a much larger picture or message.
        return np.array(square_resize(decode(frame.payload, codec, frame.width, frame.height), size_px))
    except ProtocolError as error:
        return error


class Intake:
    """The driving frames of one session between socket and pipeline."""

    def __init__(self, hello: Hello, config: ModelConfig):
        self.num_received = 0
        self.num_used = 0
        self.dropped: Counter[str] = Counter()
        """By reason; num_received = num_used + all of these + those still pending or taken."""
        self._hello = hello
        self._num_frames, self._num_levels = config.window.chunk_frames, config.window.num_levels
        self._pending: list[ReceivedFrame] = []
        self._taken: list[ReceivedFrame] = []
        self._history: deque[Pixels] = deque(maxlen=chunks.num_flush_history(self._num_frames, self._num_levels))
        self._tail: list[Pixels] | None = None
        self._has_ended = False
        self._last_seq = -1
        self._last_used_ms: float | None = None
        self._frame_size: tuple[int, int] | None = None
        self._interval_s: float | None = None

    @property
    def is_used_up(self) -> bool:
        """Whether the client has ended and everything has been used, padding too."""
        return self._has_ended and not self._pending and not self._num_padding

    @property
    def chunk_pixels(self) -> int:
        """How many a chunk has as it comes; 0 before the first frame."""
        width, height = self._frame_size or (0, 0)
        return self._num_frames * width * height

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
            self._interval_s = flow.mean_interval_s(self._interval_s, now_s - self._pending[-1].stamp.received_s)
        self._pending.append(frame)
        self._drop_old(now_s, period_s)

    def end(self) -> None:
        """No more frames will come."""
        self._has_ended = True

    def drop_pending(self) -> None:
        """The session stops: what was not used will never be."""
        self.dropped["unused"] += len(self._pending) + len(self._taken)
        self._pending, self._taken = [], []

    def take_out(self, now_s: float, period_s: float | None) -> list[ReceivedFrame] | None:
        """The frames of the next chunk, if there are enough; after the end fewer, even none, since padding fills it.

        None: nothing can be formed now. Otherwise `use` or `give_back` must follow.
        """
        self._drop_old(now_s, period_s)
        if len(self._pending) >= self._num_frames:
            self._taken, self._pending = self._pick()
        elif self._has_ended and not self.is_used_up:
            self._taken, self._pending = self._pending, []
        else:
            return None
        return self._taken

    def use(self, pictures: Sequence[Pixels]) -> tuple[list[Stamp], Pixels]:
        """The frames that were taken out have become these pictures: their stamps, and the chunk for the pipeline.

        The chunk is (chunk_frames, size_px, size_px, 3); padding fills what the stamps do not name.
        """
        stamps, self._taken = [frame.stamp for frame in self._taken], []
        self._history.extend(pictures)
        self.num_used += len(stamps)
        self._last_used_ms = stamps[-1].capture_ms if stamps else self._last_used_ms
        return stamps, np.stack([*pictures, *self._padding(self._num_frames - len(stamps))])

    def give_back(self, is_damaged: Sequence[bool]) -> None:
        """Some of the frames that were taken out are damaged: those are dropped, the others wait again."""
        whole = [frame for frame, damaged in zip(self._taken, is_damaged, strict=True) if not damaged]
        self.dropped["bad_frame"] += len(self._taken) - len(whole)
        self._pending, self._taken = whole + self._pending, []

    def _checked(self, message: DrivingFrame, payload: memoryview, now_s: float, credit: int) -> ReceivedFrame:
        if self._has_ended:
            raise ProtocolError("a frame came after end: end is the last word", "unexpected")
        if self._hello.mode == "lossless" and self.num_received > credit:
            raise ProtocolError(f"{credit} frames have credit, and one more came: wait for credit", "no_credit")
        if message.seq <= self._last_seq:
            raise ProtocolError(f"frame {message.seq} came after {self._last_seq}: seq must increase", "seq_backwards")
        self._last_seq = message.seq
        size = frame_size(payload, self._hello.codec, message.width, message.height)
        self._frame_size = self._frame_size or size
        if size != self._frame_size:
            sizes = f"{size[0]}x{size[1]} after {self._frame_size[0]}x{self._frame_size[1]}"
            raise ProtocolError(f"a frame is {sizes}: keep one size for a session", "frame_size_changed")
        return ReceivedFrame(Stamp(message.seq, message.capture_ms, now_s), payload, *size)

    def _drop_old(self, now_s: float, period_s: float | None) -> None:
        # What a client sent last before its end stays: nothing newer will come.
        if self._hello.mode == "lossless" or self._has_ended:
            return
        if period_s is not None and self._interval_s is not None:
            # A camera slower than the pipeline sets the pace, or its chunks would be too old before they are whole.
            period_s = max(period_s, self._interval_s * self._num_frames)
        ring = flow.keep_recent(self._pending, now_s, period_s, self._num_frames)
        self._pending = ring.frames
        self.dropped["stale"] += ring.num_stale
        self.dropped["surplus"] += ring.num_surplus

    def _pick(self) -> tuple[list[ReceivedFrame], list[ReceivedFrame]]:
        """The frames of a full chunk, and those that stay."""
        num = self._num_frames
        if self._hello.mode == "lossless":
            return self._pending[:num], self._pending[num:]
        times = [frame.stamp.capture_ms for frame in self._pending]
        indices = flow.spread_evenly(times, self._last_used_ms, num)
        self.dropped["surplus"] += len(self._pending) - num
        return [self._pending[index] for index in indices], []

    @property
    def _num_padding(self) -> int:
        """How many pictures of padding are still to come after the end."""
        if self._tail is not None:
            return len(self._tail)
        total = self.num_used + len(self._pending)
        return len(chunks.flush_indices(total, self._num_frames, self._num_levels)) if total else 0

    def _padding(self, num: int) -> list[Pixels]:
        if num and self._tail is None:
            oldest = self.num_used - len(self._history)
            indices = chunks.flush_indices(self.num_used, self._num_frames, self._num_levels)
            self._tail = [self._history[index - oldest] for index in indices]
        taken, self._tail = (self._tail[:num], self._tail[num:]) if self._tail is not None else ([], None)
        return taken
