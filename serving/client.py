"""A client for `/v1/stream`: a small class, and `python -m serving.client`, which plays a video through a server.

    async with Client("ws://127.0.0.1:8000/v1/stream", portrait=data) as client:
        await client.send(rgb)
        async for frame in client:
            ...

The command writes the output as a video and prints rates and delays. Called by `serving.bench` too. No Ray, no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serving import protocol, report
from serving.codec import decode, encode
from serving.line import Event, LastingLine, Line, ServerError, UnreachableError, now_ms
from serving.protocol import CodecName, Mode
from serving.report import Receipt
from serving.tasks import all_of
from stages.errors import UserError
from stages.messages import Pixels
from stages.portraits import bundled_portraits, read_portrait
from stages.video import (
    FramesHash,
    TimedFrame,
    VideoWriter,
    check_output,
    header_num_frames,
    read_video,
    square_resize,
)

URL = "ws://127.0.0.1:8000/v1/stream"


@dataclass(frozen=True)
class ReceivedOutput:
    """An output frame as it came; its picture is decoded when it is first asked for."""

    message: protocol.OutputFrame
    received_ms: float
    payload: memoryview
    codec: CodecName

    @cached_property
    def rgb(self) -> Pixels:
        """The picture. Raises ProtocolError where the payload is none."""
        return decode(self.payload, self.codec, self.message.width, self.message.height)

    @property
    def delay_ms(self) -> float | None:
        """From capture to receipt; None in the transition."""
        return None if self.message.capture_ms is None else self.received_ms - self.message.capture_ms


class Client:
    """One session: enter it, send frames, iterate over output. Both may run at the same time in two tasks.

    `portrait`: a picture file's bytes, or a bundled portrait's name. A live session whose connection breaks, or whose
    replica is being replaced, goes on over a new connection; frames sent in between are dropped. It is given up when
    nothing was heard for `reconnect_s` (0: at once). `decode=False` leaves pictures encoded until their `rgb` is asked
    for. `on_queued` gets the position and the estimate in seconds while the session waits for a place.
    Raises UnreachableError and ServerError, on entering and from the iteration.
    """

    def __init__(
        self,
        url: str = URL,
        *,
        portrait: bytes | str,
        mode: Mode = "live",
        codec: CodecName = "jpeg",
        quality: int = 90,
        seed: int = 0,
        reconnect_s: float = 30.0,
        decode: bool = True,
        on_queued: Callable[[int, float], None] | None = None,
    ):
        name, portrait_file = (portrait, b"") if isinstance(portrait, str) else (None, portrait)
        self._url = url
        self._hello = protocol.Hello(protocol.PROTOCOL, name, mode, codec, quality, seed)
        # Nothing may be missing from a lossless session, so it ends with its connection.
        lasting_s = reconnect_s if mode == "live" else 0.0
        self._line = LastingLine(url, self._hello, portrait_file, lasting_s, self._take_remark)
        self._decode = decode
        self._on_queued = on_queued
        self.ended: protocol.Ended | None = None
        """The server's statistics of the last connection, once iteration has come to its end."""
        self.complaints: list[protocol.Error | protocol.Notice] = []
        """What the server remarked without ending the session."""
        self.dropped: Counter[str] = Counter()
        """Driving frames that the server dropped, by reason, over all connections."""
        self.num_unsent = 0
        """Frames dropped here, since there was no connection."""
        self._inbox: asyncio.Queue[tuple[Line, ReceivedOutput] | None] = asyncio.Queue()
        self._reading: asyncio.Task[None]
        self._credit_came = asyncio.Event()
        self._credit = 0
        self._num_frames = 0

    @property
    def ready(self) -> protocol.Ready:
        """Sizes, limits and the structural delay, as the server said last; there is none before entering."""
        return self._line.ready

    @property
    def events(self) -> list[Event]:
        """What happened to the session beside its frames, the newest last."""
        return self._line.events

    @property
    def num_reconnects(self) -> int:
        """Connections after the first."""
        return self._line.num_reconnects

    async def __aenter__(self) -> Client:
        await self._line.open()
        self._credit = self.ready.credit
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._line.close()

    async def send(self, rgb: Pixels, capture_ms: float | None = None) -> int:
        """Sends a picture of any size, cropped and resized as the model needs it; returns its sequence number.

        A lossless session waits here for credit. `capture_ms`: on the clock of `now_ms`, by default now.
        """
        captured_ms = now_ms() if capture_ms is None else capture_ms
        payload = encode(square_resize(rgb, self.ready.size_px), self._hello.codec, self._hello.quality)
        return await self.send_encoded(payload, captured_ms)

    async def send_encoded(self, payload: bytes, capture_ms: float | None = None) -> int:
        """The same with a picture that is already in the session's codec, `ready.size_px` wide and high."""
        captured_ms = now_ms() if capture_ms is None else capture_ms
        while self._hello.mode == "lossless" and self._num_frames >= self._credit:
            await self._wait_for_credit()
        seq, self._num_frames = self._num_frames, self._num_frames + 1
        size_px = self.ready.size_px if self._hello.codec == "raw" else None
        is_sent = await self._line.send(protocol.DrivingFrame(seq, captured_ms, size_px, size_px), payload)
        self.num_unsent += not is_sent
        return seq

    async def end(self) -> None:
        """No more frames: iteration stops when everything has come out."""
        await self._line.end()

    async def __aiter__(self) -> AsyncIterator[ReceivedOutput]:
        """Output frames in order, each reported as shown when the next one is asked for."""
        while (entry := await self._inbox.get()) is not None:
            line, output = entry
            yield output
            line.num_shown += 1
            if self.ended is None:
                await line.send(protocol.Shown(line.num_shown, now_ms()))
        await self._reading

    async def _wait_for_credit(self) -> None:
        self._credit_came.clear()
        waiting = asyncio.ensure_future(self._credit_came.wait())
        await asyncio.wait([waiting, self._reading], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._reading.done():
            self._reading.result()
            raise UnreachableError(f"{self._url} ended the session before all frames were sent")

    async def _read(self) -> None:
        """Takes in what comes, until the server's end."""
        try:
            while self.ended is None:
                self._take(*await self._line.receive())
        finally:
            self._inbox.put_nowait(None)

    def _take(self, line: Line, message: protocol.ServerMessage, payload: memoryview) -> None:
        match message:
            case protocol.OutputFrame():
                output = ReceivedOutput(message, now_ms(), payload, self._hello.codec)
                if self._decode:
                    _ = output.rgb
                self._inbox.put_nowait((line, output))
                self._count_drops(line, message.dropped)
            case protocol.Credit():
                self._credit = message.frames
                self._credit_came.set()
            case protocol.Ended():
                self._count_drops(line, message.dropped)
                self.ended = message
            case _:
                self._take_remark(message)

    def _take_remark(self, message: protocol.ServerMessage) -> None:
        match message:
            case protocol.Queued() if self._on_queued is not None:
                self._on_queued(message.position, message.estimate_s)
            case protocol.Notice() | protocol.Error():
                self.complaints.append(message)

    def _count_drops(self, line: Line, dropped: Mapping[str, int]) -> None:
        self.dropped += Counter(dropped) - Counter(line.dropped)
        line.dropped = dropped


@dataclass
class Run:
    """What playing one video has brought."""

    receipts: list[Receipt] = field(default_factory=list)
    stage_ms: list[Mapping[str, float]] = field(default_factory=list)
    pixels: FramesHash = field(default_factory=FramesHash)
    sent: dict[int, float] = field(default_factory=dict)
    """Sequence number to the time in the video, of frames whose output has not come."""
    num_sent: int = 0
    num_no_face: int = 0
    started_ms: float = 0.0


def driving_frames(path: Path, seconds: float | None, loop: bool) -> Iterator[TimedFrame]:
    """The frames of a video, again and again with `loop`, up to `seconds` on its clock. Raises BadVideo."""
    offset_s, first_s = 0.0, None
    while True:
        times_s: list[float] = []
        for frame in read_video(path):
            times_s.append(frame.time_s)
            first_s = frame.time_s if first_s is None else first_s
            time_s = frame.time_s + offset_s
            if seconds is not None and time_s - first_s >= seconds:
                return
            yield TimedFrame(frame.rgb, time_s)
        if not loop:
            return
        span_s = times_s[-1] - times_s[0]
        offset_s += span_s + (span_s / (len(times_s) - 1) if len(times_s) > 1 else 0.04)


async def play(client: Client, frames: Iterator[TimedFrame], mode: Mode, writer: VideoWriter, bar: Any) -> Run:
    """Sends the frames, at their own pace in live mode, and writes what comes back at the same times."""
    run = Run(started_ms=now_ms())
    await all_of(_send_all(client, frames, mode, run), _receive_all(client, run, writer, bar))
    return run


async def _send_all(client: Client, frames: Iterator[TimedFrame], mode: Mode, run: Run) -> None:
    first_s: float | None = None
    while (frame := await asyncio.to_thread(next, frames, None)) is not None:
        if first_s is None:
            first_s, run.started_ms = frame.time_s, now_ms()
        if mode == "live":
            await asyncio.sleep(frame.time_s - first_s - (now_ms() - run.started_ms) / 1000)
        if client.ended is not None:
            return
        # Noted before it is sent, since its output may come while the sender still waits for the socket.
        run.sent[run.num_sent] = frame.time_s
        run.num_sent += 1
        await client.send(frame.rgb)
    await client.end()


async def _receive_all(client: Client, run: Run, writer: VideoWriter, bar: Any) -> None:
    async for output in client:
        run.stage_ms.append(output.message.stage_ms)
        if output.message.seq is None or output.delay_ms is None:
            continue
        run.receipts.append(Receipt((output.received_ms - run.started_ms) / 1000, output.delay_ms))
        run.num_no_face += output.message.no_face
        run.pixels.update(output.rgb)
        await asyncio.to_thread(writer.write, output.rgb, run.sent.pop(output.message.seq))
        bar.set_postfix(delay_ms=round(output.delay_ms), refresh=False)
        bar.update()


def make_report(run: Run, client: Client) -> dict[str, Any]:
    """The figures of a run, with the keys that `--json` prints."""
    # Unsent ones are counted as drops, so that a run's frames add up also after a connection was lost.
    dropped = client.dropped + Counter(unsent=client.num_unsent)
    return {
        "fps": report.rate(run.receipts),
        "frames_sent": run.num_sent,
        "frames_dropped": dropped.total(),
        "frames_received": len(run.receipts),
        "delay_ms": report.percentiles([receipt.delay_ms for receipt in run.receipts]),
        "per_10_s": report.per_10_s(run.receipts),
        "frames_sha256": run.pixels.hexdigest(),
        "dropped": dict(dropped),
        "no_face_frames": run.num_no_face,
        "stage_ms": report.mean_stage_ms(run.stage_ms),
        "recoveries": [event.detail for event in client.events if event.name == "recovered"],
        "reconnects": client.num_reconnects,
    }


async def run_client(args: argparse.Namespace) -> dict[str, Any]:
    """Plays args.driving through the server into args.out. Raises UserError; what came before it is kept."""
    check_output(args.out, args.driving, args.portrait)
    mode: Mode = "lossless" if args.lossless else "live"
    num_frames = header_num_frames(args.driving)
    total = None if args.seconds or args.loop else num_frames
    frames = driving_frames(args.driving, args.seconds, args.loop)
    client = Client(
        args.url,
        portrait=read_portrait(args.portrait),
        mode=mode,
        codec=args.codec,
        quality=args.quality,
        seed=args.seed,
        on_queued=print_place,
    )
    # A loop has no sound: it would break off where the video starts again.
    writer = VideoWriter(args.out, audio_from=None if args.loop else args.driving)
    # Only closed, never discarded: what was received before an error or an interruption cannot be made again.
    with contextlib.closing(writer):
        async with client:
            with tqdm(total=total, unit="frame", file=sys.stderr, disable=None) as bar:
                run = await play(client, frames, mode, writer, bar)
    for complaint in client.complaints:
        print(f"server: {complaint.code}: {complaint.message}", file=sys.stderr)
    return make_report(run, client)


def print_place(position: int, estimate_s: float) -> None:
    """The place in line; in a terminal over the last one, since waiting may take long."""
    end = "\x1b[K\r" if sys.stderr.isatty() else "\n"
    print(f"number {position} in line, about {estimate_s:.0f} s", end=end, file=sys.stderr, flush=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m serving.client", description="Plays a video through a server.")
    parser.add_argument("--portrait", required=True, help=f"a file, or one of {', '.join(bundled_portraits())}")
    parser.add_argument("--driving", required=True, type=Path, help="video that moves the portrait")
    parser.add_argument("--out", required=True, type=Path, help="video to write: .mp4, .m4v, .mov or .mkv")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--seconds", type=float, help="stop after so many seconds of the video")
    parser.add_argument("--loop", action="store_true", help="start the video again at its end; needs --seconds")
    parser.add_argument("--lossless", action="store_true", help="use every frame, as fast as the server goes")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--codec", choices=["jpeg", "png", "webp", "raw"], default="jpeg")
    parser.add_argument("--quality", type=int, default=90, help="of jpeg and webp, 1 to 100")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        parser.error("--seconds must be more than 0, and an end")
    if args.loop and not args.seconds:
        parser.error("--loop needs --seconds, or it would never end")
    if not 0 <= args.seed < 2**32 or not 1 <= args.quality <= 100:
        parser.error("--seed must be 0 to 4294967295 and --quality 1 to 100")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_args(argv)
    try:
        figures = asyncio.run(run_client(args))
    except UserError as error:
        print(f"error: {error.code}: {error}", file=sys.stderr)
        if isinstance(error, ServerError) and error.retry_s is not None:
            print(f"worth another try in {error.retry_s:.0f} s", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(figures) if args.json else report.as_text(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
