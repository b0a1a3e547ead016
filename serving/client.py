"""A client for `/v1/stream`: a small class, and `python -m serving.client`, which plays a video through a server.

    async with Client("ws://127.0.0.1:8000/v1/stream", portrait=data) as client:
        await client.send(rgb)
        async for frame in client:
            ...

The command writes the output as a video and prints rates and delays. No Ray, no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from serving import protocol, report
from serving.codec import decode, encode
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
OPEN_TIMEOUT_S = 20.0


class ServerError(UserError):
    """The server ended the session. `code` is from the table in docs/protocol.md."""


class UnreachableError(UserError):
    """There is no server, or it went away without a word."""

    code = "no_connection"


def now_ms() -> float:
    """The client's clock, for capture times and receipts."""
    return time.perf_counter() * 1000


@dataclass(frozen=True)
class ReceivedOutput:
    """An output frame with its picture."""

    rgb: Pixels
    message: protocol.OutputFrame
    received_ms: float

    @property
    def delay_ms(self) -> float | None:
        """From capture to receipt; None in the transition."""
        return None if self.message.capture_ms is None else self.received_ms - self.message.capture_ms


class Client:
    """One session: enter it, send frames, iterate over output. Both may run at the same time in two tasks.

    `portrait`: a picture file's bytes, or a bundled portrait's name. Raises UnreachableError and ServerError.
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
    ):
        name, self._payload = (portrait, b"") if isinstance(portrait, str) else (None, portrait)
        self._url = url
        self._hello = protocol.Hello(protocol.PROTOCOL, name, mode, codec, quality, seed)
        self.ready: protocol.Ready
        """Set on entering: sizes, limits, the structural delay."""
        self.ended: protocol.Ended | None = None
        """The server's statistics, once iteration has come to its end."""
        self.complaints: list[protocol.Error | protocol.Notice] = []
        """What the server remarked without ending the session."""
        self._socket: ClientConnection
        self._inbox: asyncio.Queue[ReceivedOutput | None] = asyncio.Queue()
        self._reading: asyncio.Task[None]
        self._credit_came = asyncio.Event()
        self._credit = 0
        self._num_sent = 0
        self._num_shown = 0

    async def __aenter__(self) -> Client:
        with _no_connection(self._url):
            self._socket = await connect(
                self._url, max_size=4 * protocol.MAX_MESSAGE_BYTES, compression=None, open_timeout=OPEN_TIMEOUT_S
            )
        try:
            await self._send(self._hello, self._payload)
            self.ready = await self._receive_ready()
        except BaseException:
            await self._socket.close()
            raise
        self._credit = self.ready.credit
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._reading.cancel()
        with contextlib.suppress(UserError):
            if self.ended is None:
                await self._send(protocol.Bye())
        await self._socket.close()

    async def send(self, rgb: Pixels, capture_ms: float | None = None) -> int:
        """Sends a picture of any size, cropped and resized as the model needs it; returns its sequence number.

        A lossless session waits here for credit. `capture_ms`: on the clock of `now_ms`, by default now.
        """
        captured_ms = now_ms() if capture_ms is None else capture_ms
        while self._hello.mode == "lossless" and self._num_sent >= self._credit:
            await self._wait_for_credit()
        size_px = self.ready.size_px
        seq, self._num_sent = self._num_sent, self._num_sent + 1
        payload = encode(square_resize(rgb, size_px), self._hello.codec, self._hello.quality)
        sides = (size_px, size_px) if self._hello.codec == "raw" else (None, None)
        await self._send(protocol.DrivingFrame(seq, captured_ms, *sides), payload)
        return seq

    async def end(self) -> None:
        """No more frames: iteration stops when everything has come out."""
        await self._send(protocol.End())

    async def __aiter__(self) -> AsyncIterator[ReceivedOutput]:
        """Output frames in order, each reported as shown when the next one is asked for."""
        while (output := await self._inbox.get()) is not None:
            yield output
            self._num_shown += 1
            if self.ended is None:
                await self._send(protocol.Shown(self._num_shown))
        await self._reading

    async def _wait_for_credit(self) -> None:
        self._credit_came.clear()
        waiting = asyncio.ensure_future(self._credit_came.wait())
        await asyncio.wait([waiting, self._reading], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._reading.done():
            self._reading.result()
            raise UnreachableError(f"{self._url} ended the session before all frames were sent")

    async def _receive_ready(self) -> protocol.Ready:
        while True:
            message, _ = await self._receive()
            if isinstance(message, protocol.Ready):
                return message
            self._take_remark(message)

    async def _read(self) -> None:
        try:
            while self.ended is None:
                message, payload = await self._receive()
                received_ms = now_ms()
                if isinstance(message, protocol.OutputFrame):
                    rgb = decode(payload, self._hello.codec, message.width, message.height)
                    self._inbox.put_nowait(ReceivedOutput(rgb, message, received_ms))
                elif isinstance(message, protocol.Credit):
                    self._credit = message.frames
                    self._credit_came.set()
                elif isinstance(message, protocol.Ended):
                    self.ended = message
                else:
                    self._take_remark(message)
        finally:
            self._inbox.put_nowait(None)

    def _take_remark(self, message: protocol.ServerMessage) -> None:
        if isinstance(message, protocol.Error) and message.fatal:
            raise ServerError(message.message, message.code)
        if isinstance(message, protocol.Error | protocol.Notice):
            self.complaints.append(message)

    async def _receive(self) -> tuple[protocol.ServerMessage, memoryview]:
        with _no_connection(self._url):
            return protocol.parse_server(await self._socket.recv())

    async def _send(self, message: protocol.ClientMessage, payload: bytes = b"") -> None:
        data = protocol.pack(message, payload)
        try:
            await self._socket.send(data)
        except ConnectionClosed:
            # The reader knows better why: the server's last word may still lie unread.
            return


@contextlib.contextmanager
def _no_connection(url: str) -> Iterator[None]:
    try:
        yield
    except (InvalidURI, InvalidHandshake, ValueError) as error:
        raise UnreachableError(f"{url} is no stream of a PersonaLive server ({error}): check --url") from None
    except ConnectionClosed as error:
        raise UnreachableError(f"{url} closed the connection ({error}): connect again") from None
    except (OSError, TimeoutError) as error:
        raise UnreachableError(f"{url} cannot be reached ({error}): start the server, or check --url") from None


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


def make_report(run: Run, ended: protocol.Ended) -> dict[str, Any]:
    """The figures of a run, with the keys that `--json` prints."""
    return {
        "fps": report.rate(run.receipts),
        "frames_sent": run.num_sent,
        "frames_dropped": sum(ended.dropped.values()),
        "frames_received": len(run.receipts),
        "delay_ms": report.percentiles([receipt.delay_ms for receipt in run.receipts]),
        "per_10_s": report.per_10_s(run.receipts),
        "frames_sha256": run.pixels.hexdigest(),
        "dropped": ended.dropped,
        "no_face_frames": run.num_no_face,
        "stage_ms": report.mean_stage_ms(run.stage_ms),
    }


async def run_client(args: argparse.Namespace) -> dict[str, Any]:
    """Plays args.driving through the server into args.out. Raises UserError; what came before it is kept."""
    check_output(args.out, args.driving, args.portrait)
    mode: Mode = "lossless" if args.lossless else "live"
    num_frames = header_num_frames(args.driving)
    total = None if args.seconds or args.loop else num_frames
    frames = driving_frames(args.driving, args.seconds, args.loop)
    portrait = read_portrait(args.portrait)
    client = Client(args.url, portrait=portrait, mode=mode, codec=args.codec, quality=args.quality, seed=args.seed)
    # A loop has no sound: it would break off where the video starts again.
    writer = VideoWriter(args.out, audio_from=None if args.loop else args.driving)
    # Only closed, never discarded: what was received before an error or an interruption cannot be made again.
    with contextlib.closing(writer), tqdm(total=total, unit="frame", file=sys.stderr, disable=None) as bar:
        async with client:
            run = await play(client, frames, mode, writer, bar)
    assert client.ended is not None, "iteration ends with the server's end"
    for complaint in client.complaints:
        print(f"server: {complaint.code}: {complaint.message}", file=sys.stderr)
    return make_report(run, client.ended)


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
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(figures) if args.json else report.as_text(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
