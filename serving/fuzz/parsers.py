"""Broken messages through all that reads what a client sends: nothing but typed errors may come of them.

Called by `serving.fuzz`. Every message is a case of its own, with fresh state, so that it does the same when it is
played alone. No Ray, no torch.
"""

from __future__ import annotations

import itertools
import math
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import psutil

from cluster import memory
from serving import clock, protocol
from serving.codec import decode, frame_size
from serving.delivery import Delivery, Output
from serving.fuzz.mutations import SIDE_PX, Fuzzed, fuzzed
from serving.intake import Intake, decode_frames
from serving.protocol import Mode, ProtocolError
from stages import portraits
from stages.config import ModelConfig, UNetConfig, WindowConfig
from stages.errors import UserError

CLIENT_CODES = protocol.ENDING_CODES | {
    *("bad_header", "bad_frame", "frame_size_changed", "seq_backwards", "bad_receipt", "unexpected"),
    *("no_face_in_portrait", "pool_full", "session_moved"),
}
"""What a client may be told for what it sent, or because all is taken. `internal` and its like are not among them."""
MAX_CALL_S = 1.0
"""Of the processor: what else the machine does must not count."""
MAX_PORTRAIT_S = 3.0
"""A portrait may have ten times a frame's pixels; it is decoded once a session, in a thread for portraits alone."""
MAX_GROWTH = 0.02
"""Of the memory, from `WARM_UP` of the messages to the last."""
WARM_UP = 0.2
MIN_MESSAGES_FOR_GROWTH = 20_000
"""With fewer, what every path needs once is too much of it."""
MAX_FAILURES = 20
WINDOW = WindowConfig(chunk_frames=2, timesteps=(0, 1, 2))
MODEL = ModelConfig(size_px=SIDE_PX, window=WINDOW, unet=UNetConfig(max_positions=64))
CAPTURE_STEPS_MS = (0.0, 40.0, 40.0, -1e14, 1e14)
"""From one frame to the next: clocks jump."""
OUTPUT = Output(np.zeros((1, 1, 3), np.uint8), None, no_face=False, stage_ms={}, due_s=0.0)
KNOWN_CLOCK = clock.Clock(offset_ms=0.0, error_ms=100.0, at_ms=0.0)
CREDIT = 4
PORTRAIT = "portrait"

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Something that must not happen, and the message that did it, where it was one."""

    what: str
    message: Fuzzed | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: of the bytes the beginning, as hexadecimal digits."""
        if self.message is None:
            return {"what": self.what}
        about = self.message
        return {"what": self.what, "number": about.number, "text": about.is_text, "hex": about.data[:200].hex()}


@dataclass
class Trial:
    """Calls with broken messages: what they said, how long they took, and what must not have happened."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By call: `accepted`, the code of the error, or `failed`."""
    slowest: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By call: seconds of the processor, and the message's number."""
    failures: list[Failure] = field(default_factory=list)

    def call(self, name: str, about: Fuzzed, function: Callable[..., T], *args: Any) -> T | None:
        """What the function returns; None where it refused with a typed error, or failed."""
        started_s = time.process_time()
        result, code = None, "accepted"
        try:
            result = function(*args)
        except UserError as error:
            code = error.code
            self._check_error(name, about, error)
        except Exception:
            code = "failed"
            self.fail(name, about, traceback.format_exc(limit=-3))
        took_s = time.process_time() - started_s
        self.counts[name][code] += 1
        self.slowest[name] = max(self.slowest.get(name, (0.0, 0)), (took_s, about.number))
        if took_s > (MAX_PORTRAIT_S if name == PORTRAIT else MAX_CALL_S):
            self.fail(name, about, f"took {took_s:.2f} s")
        return result

    def fail(self, name: str, about: Fuzzed, what: str) -> None:
        """Notes a failure; after many of them no more."""
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(Failure(f"{name}, {about.kind}: {what}", about))

    def _check_error(self, name: str, about: Fuzzed, error: UserError) -> None:
        """An error is only good if it has a known code, and can be told."""
        if error.code not in CLIENT_CODES:
            self.fail(name, about, f"{error.code} is no code for a client: {error}")
        try:
            protocol.parse_server(protocol.pack(protocol.Error(error.code, str(error), fatal=False)))
        except (ValueError, ProtocolError) as untold:
            self.fail(name, about, f"its error cannot be told: {untold}")


def try_parsers(messages: Iterable[Fuzzed], trial: Trial) -> None:
    """Gives every message to all that would see it in a server and in a client."""
    for message in messages:
        trial.call("split", message, protocol.split, message.message)
        trial.call("parse_server", message, protocol.parse_server, message.message)
        parsed = trial.call("parse_client", message, protocol.parse_client, message.message)
        if parsed is not None:
            _try_content(trial, message, *parsed)


def run_parsers(num_messages: int, seed: int) -> tuple[dict[str, Any], list[Failure]]:
    """So many messages in this process. Returns the figures, and what failed."""
    trial, kinds = Trial(), Counter[str]()
    started_s = time.monotonic()
    messages = (fuzzed(seed, number) for number in range(num_messages))

    def counted(num: int) -> Iterator[Fuzzed]:
        for message in itertools.islice(messages, num):
            kinds[message.kind] += 1
            yield message

    num_warm_up = int(num_messages * WARM_UP)
    rss_mb = {}
    for name, num in (("early", num_warm_up), ("end", num_messages - num_warm_up)):
        try_parsers(counted(num), trial)
        rss_mb[name] = own_rss_mb()
    failures = trial.failures + growth(rss_mb, num_messages)
    figures = {
        "messages": num_messages,
        "seconds": round(time.monotonic() - started_s, 1),
        "rss_mb": rss_mb,
        "kinds": dict(kinds.most_common()),
        "slowest_ms": {name: [round(took_s * 1000, 1), number] for name, (took_s, number) in trial.slowest.items()},
        "counts": {name: dict(counts.most_common()) for name, counts in trial.counts.items()},
        "failures": [failure.as_dict() for failure in failures],
    }
    return figures, failures


def own_rss_mb() -> float:
    """Memory of this process, after it has given back what it does not use."""
    memory.release()
    return round(psutil.Process().memory_info().rss / 2**20, 1)


def growth(rss_mb: dict[str, float], num_messages: int) -> list[Failure]:
    """A failure where the memory at `end` is more than `MAX_GROWTH` above that `early`, of enough messages."""
    if num_messages < MIN_MESSAGES_FOR_GROWTH or rss_mb["end"] <= rss_mb["early"] * (1 + MAX_GROWTH):
        return []
    return [Failure(f"memory grew from {rss_mb['early']} MB to {rss_mb['end']} MB")]


def _try_content(trial: Trial, about: Fuzzed, said: protocol.ClientMessage, payload: memoryview) -> None:
    match said:
        case protocol.DrivingFrame():
            trial.call("frame_size", about, frame_size, payload, about.codec, said.width, said.height)
            trial.call("decode", about, decode, payload, about.codec, said.width, said.height)
            _try_intake(trial, about, said, payload, "live")
            _try_intake(trial, about, said, payload, "lossless")
        case protocol.Shown():
            delivery = Delivery(WINDOW, "live", max_in_flight=2)
            for _ in range(3):
                delivery.sent(OUTPUT, 0.0)
            trial.call("shown", about, delivery.shown, said.count, 1.0)
        case protocol.Ping():
            heard = trial.call("ping", about, clock.hear, KNOWN_CLOCK, said.client_ms, 1000.0, said.rtt_ms)
            if heard is not None and not math.isfinite(clock.client_time_ms(heard, 1000.0)):
                trial.fail("ping", about, f"the clock is nowhere: {heard}")
        case protocol.Hello():
            trial.call(PORTRAIT, about, _load_portrait, said, payload)


def _load_portrait(hello: protocol.Hello, payload: memoryview) -> None:
    data = bytes(payload) if hello.portrait is None else portraits.read_bundled_portrait(hello.portrait)
    portraits.load_portrait(data, SIDE_PX)


def _try_intake(trial: Trial, about: Fuzzed, first: protocol.DrivingFrame, payload: memoryview, mode: Mode) -> None:
    """A camera whose pictures are all this one, from its first frame to its end."""
    intake = Intake(protocol.Hello(protocol.PROTOCOL, mode=mode, codec=about.codec), MODEL)
    for number, frame in enumerate(_camera(first)):
        trial.call(f"take {mode}", about, intake.take, frame, payload, number / 25, CREDIT, 0.5)
        if sum(intake.dropped.values()) == intake.num_received:
            break
    _form_chunks(trial, about, intake, f"chunks {mode}")
    intake.end()
    _form_chunks(trial, about, intake, f"chunks {mode}")
    if not intake.is_used_up:
        trial.fail(f"chunks {mode}", about, "frames are left behind the end")
    if intake.num_received != intake.num_used + sum(intake.dropped.values()):
        trial.fail(f"chunks {mode}", about, "frames are missing from the statistics")


def _camera(first: protocol.DrivingFrame) -> Iterator[protocol.DrivingFrame]:
    capture_ms = first.capture_ms
    for number, step_ms in enumerate(CAPTURE_STEPS_MS):
        capture_ms = min(max(capture_ms + step_ms, -1e15), 1e15)
        yield replace(first, seq=min(first.seq + number, 2**53), capture_ms=capture_ms)


def _form_chunks(trial: Trial, about: Fuzzed, intake: Intake, name: str) -> None:
    """As long as there are any."""
    while (frames := trial.call(name, about, intake.take_out, 0.2, 0.5)) is not None:
        pictures = []
        for frame in frames:
            decoded = trial.call("decode_frames", about, decode_frames, [frame], about.codec, SIDE_PX)
            pictures.append(decoded[0] if decoded else ProtocolError("it failed"))
        whole = [picture for picture in pictures if not isinstance(picture, ProtocolError)]
        if len(whole) == len(pictures):
            trial.call(name, about, intake.use, whole)
        else:
            trial.call(name, about, intake.give_back, [isinstance(picture, ProtocolError) for picture in pictures])
