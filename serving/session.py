"""One person's stream on the server, from hello to end. Called by `serving.application` for every websocket.

Four tasks: the reader never waits for the pipeline; the feeder lets chunks in when there is credit; the collector takes
results in order; the sender paces them. Their state and choices are in `serving.intake` and `serving.delivery`; here is
the I/O. Pictures are decoded and encoded in threads, since all sessions of a replica share its event loop. The pipeline
is known only as the protocols of `serving.pipeline`: no Ray, no torch.

A live session outlives its connection for a while: it has a token, with which its client may go on over another
connection, also to another replica. The session's id is the token's hash, so that logs do not give it away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from starlette.websockets import WebSocketDisconnect

from cluster.turnstile import Turnstile
from serving import clock, protocol
from serving.codec import encode
from serving.connection import Connection
from serving.delays import DelayWindow
from serving.delivery import Decoded, Delivery, Output
from serving.flow import Stamp
from serving.intake import Intake, decode_frames
from serving.logs import log_event
from serving.metrics import IngressMetrics, SessionMeter
from serving.pipeline import Pipeline, Stream
from serving.protocol import ProtocolError
from serving.settings import Settings
from serving.tasks import all_of, first_to_end
from stages import portraits
from stages.config import ModelConfig
from stages.errors import UserError
from stages.messages import Pixels

logger = logging.getLogger("ray.serve")

PONG_INTERVAL_S = 0.1
TOKEN_BYTES = 24
MAX_DELAY_MS = 3.6e6
"""A client may say anything of its clock."""
MANY_PIXELS = 4_000_000
"""In the frames of a chunk: four of 1280x720 have fewer, and our own clients send much smaller ones."""
LARGE_FRAMES_SHARE = 0.1
"""Of the time: so long may a session's larger frames be decoded."""
FIRST_LOOK_S = 0.05
"""Between a hello and the work that it asks for: who says hello and vanishes, again and again, costs no work."""
NOTICE_S = 1.0
"""Who waits longer than this for the model is told why."""


@dataclass(frozen=True)
class Surroundings:
    """What all sessions of a replica share."""

    connect: Callable[[], Awaitable[Pipeline]]
    """The pipeline: may take as long as weights take to load."""
    settings: Settings
    portrait_thread: Executor
    """For portraits: they may have 40 megapixels, so they are decoded one at a time, and not among frames."""
    portraits: Turnstile
    """Who waits for that. Whoever leaves meanwhile costs nothing."""
    metrics: IngressMetrics
    draining: asyncio.Event
    """Set when the replica is being replaced."""


async def serve_session(session: Session) -> None:
    """Talks with one client until it leaves, ends or is refused. Whatever a client does, this does not raise."""
    last: protocol.ServerMessage | None = None
    try:
        last = await session.run()
        code = "end" if session.has_ended else "bye"
    except (WebSocketDisconnect, ConnectionError):
        code = "gone"
    except UserError as error:
        code = error.code
        last = protocol.Error(code, str(error)[:2000], fatal=True, retry_s=getattr(error, "retry_s", None))
    except Exception:
        code = "internal"
        logger.exception("session %s failed", session.id)
        last = protocol.Error("internal", "the server failed, and its log says why: try again", fatal=True)
    session.log_end(code)
    await session.connection.finish(last)


class Session:
    """The four tasks of one stream, and what they share. One event loop, so no locks."""

    def __init__(self, connection: Connection, surroundings: Surroundings):
        self.id = "-"
        self.connection = connection
        self.stream: Stream | None = None
        self.is_queued = self.is_idle = False
        self._connect, self._settings = surroundings.connect, surroundings.settings
        self._portrait_thread, self._portraits = surroundings.portrait_thread, surroundings.portraits
        self._draining = surroundings.draining
        self._metrics, self._meter = surroundings.metrics, SessionMeter(surroundings.metrics)
        self._hello = protocol.Hello(protocol=protocol.PROTOCOL)
        self._portrait_file = b""
        self._intake: Intake | None = None
        self._delivery: Delivery | None = None
        self._outputs: asyncio.Queue[Output | None] = asyncio.Queue()
        self._calls: asyncio.Queue[tuple[list[Stamp], asyncio.Task[Decoded]] | None] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._granted = 0
        self._num_refused = 0
        self._next_pong_s = float("-inf")
        self._large_frames = Turnstile(LARGE_FRAMES_SHARE)
        self._clock: clock.Clock | None = None
        self._delays = DelayWindow()
        self._has_vanished = self._knows_token = False
        self._started_s = time.monotonic()

    async def run(self) -> protocol.Ended:
        """Returns the statistics when the client has said bye, or when everything has been sent after its end."""
        message, payload = protocol.parse_client(await self.connection.receive(self._settings.hello_timeout_s))
        if not isinstance(message, protocol.Hello):
            raise ProtocolError(f"{message.type!r} came before hello: say hello first", "not_hello")
        if message.resume is not None and message.mode == "lossless":
            raise ProtocolError("a lossless session cannot be resumed: begin a new one", "unexpected")
        self._hello, self._portrait_file = message, bytes(payload)
        del message, payload
        await first_to_end(self._read(), self._work())
        return self._statistics()

    async def _read(self) -> None:
        """Takes in what the client says, until bye."""
        while True:
            data = await self._hear()
            self._check_receipts_come()
            try:
                message, payload = protocol.parse_client(data)
                if isinstance(message, protocol.Bye):
                    return
                await self._take(message, payload)
            except ProtocolError as error:
                await self._refuse(error)

    async def _hear(self) -> str | bytes:
        """The next message. While a client waits for the model it may be silent."""
        while True:
            try:
                return await self.connection.receive(self._settings.idle_timeout_s)
            except (WebSocketDisconnect, ConnectionError):
                self._has_vanished = True
                raise
            except ProtocolError as error:
                if error.code != "idle" or not (self._delivery is None or self._delivery.owes_output):
                    raise

    def _check_receipts_come(self) -> None:
        limit_s = self._settings.idle_timeout_s
        if self._delivery is not None and self._delivery.owing_s(time.monotonic()) > limit_s:
            raise ProtocolError(f"nothing was reported shown for {limit_s:g} s: send shown receipts", "stalled")

    async def _take(self, message: protocol.ClientMessage, payload: memoryview) -> None:
        if isinstance(message, protocol.Ping):
            await self._answer(message)
            return
        if self._intake is None or self._delivery is None or isinstance(message, protocol.Hello):
            raise ProtocolError(f"{message.type!r} has its place once, and after ready the others", "unexpected")
        match message:
            case protocol.DrivingFrame():
                self._intake.take(message, payload, time.monotonic(), self._granted, self._delivery.pace.period_s)
            case protocol.Shown():
                self._learn_delays(self._delivery.shown(message.count, time.monotonic()), message.shown_ms)
                await self._grant()
            case protocol.End():
                self._intake.end()
        self._changed.set()

    async def _answer(self, ping: protocol.Ping) -> None:
        """Not every one of a flood: answers that a client does not read would pile up before it."""
        self._clock = clock.hear(self._clock, ping.client_ms, time.time() * 1000, ping.rtt_ms)
        if time.monotonic() >= self._next_pong_s:
            self._next_pong_s = time.monotonic() + PONG_INTERVAL_S
            await self.connection.send(protocol.Pong(ping.client_ms, time.time() * 1000))

    def _learn_delays(self, captures_ms: list[float | None], shown_ms: float | None) -> None:
        """From capture to shown, of the frames that a receipt names: by the client's clock alone, if it says when."""
        if shown_ms is None and self._clock is not None:
            shown_ms = clock.client_time_ms(self._clock, time.time() * 1000)
        for capture_ms in captures_ms:
            delay_ms = None
            if capture_ms is not None and shown_ms is not None:
                delay_ms = min(max(shown_ms - capture_ms, 0.0), MAX_DELAY_MS)
                self._metrics.delay_ms(delay_ms)
            self._delays.add(time.monotonic(), delay_ms)

    async def _refuse(self, error: ProtocolError) -> None:
        """Tells the client; ends the session where the protocol says so."""
        self._num_refused += 1
        is_last = self._hello.mode == "lossless" or self._num_refused > protocol.MAX_NUM_REFUSED
        if error.code in protocol.ENDING_CODES or is_last:
            raise error
        await self.connection.send(protocol.Error(error.code, str(error), fatal=False))

    async def _work(self) -> None:
        """Opens the stream, says ready, and runs it to its end."""
        pipeline = await self._pipeline()
        stream, token, is_resumed = await self._open(pipeline)
        try:
            intake = Intake(self._hello, pipeline.config)
            delivery = Delivery(pipeline.config.window, self._hello.mode, self._settings.max_chunks_in_flight)
            self.stream, self._intake, self._delivery = stream, intake, delivery
            self._knows_token = is_resumed
            await self._say_ready(token, is_resumed, pipeline.config, delivery.credit)
            if self._draining.is_set():
                await self.announce_draining()
            self._knows_token = self._hello.mode == "live"
            size_px = pipeline.config.size_px
            feeding = self._feed(stream, intake, delivery, size_px)
            await all_of(feeding, self._collect(delivery), self._send_outputs(delivery))
        except (WebSocketDisconnect, ConnectionError):
            self._has_vanished = True
            raise
        finally:
            if self._has_vanished and self._knows_token and self._settings.resume_s:
                stream.park(self._settings.resume_s)
            else:
                await stream.close()

    async def _open(self, pipeline: Pipeline) -> tuple[Stream, str, bool]:
        """The stream of the client's token where there is one, else a new one; its token; and whether it goes on."""
        portrait = await self._portrait(pipeline.config.size_px)
        try:
            if token := self._hello.resume:
                self.id = session_id(token)
                if stream := await pipeline.resume(self.id, portrait, self):
                    self._metrics.admissions_total(1, "resumed")
                    return stream, token, True
            token = secrets.token_urlsafe(TOKEN_BYTES)
            self.id = session_id(token)
            log_event(logger, "opened", self.id, mode=self._hello.mode, codec=self._hello.codec, seed=self._hello.seed)
            stream = await pipeline.open(portrait, self._hello.seed, self.id, self)
        except UserError as error:
            if error.code == "busy":
                self._metrics.admissions_total(1, "refused")
            raise
        finally:
            self.is_queued = False
        self._metrics.admissions_total(1, "admitted")
        return stream, token, False

    async def queued(self, position: int, estimate_s: float) -> None:
        """All places are taken. As the next two, for the stream to call."""
        if not self.is_queued:
            self._metrics.admissions_total(1, "queued")
            log_event(logger, "queued", self.id, position=position, estimate_s=estimate_s)
        self.is_queued = True
        await self.connection.send(protocol.Queued(position, estimate_s))

    async def recovering(self) -> None:
        """A process that worked for this session has died."""
        log_event(logger, "recovering", self.id)
        told = "a part of the server is being replaced: the picture goes on in a moment"
        await self.connection.send(protocol.Notice("recovering", told))

    async def recovered(self, parts_ms: Mapping[str, float]) -> None:
        """And has been replaced."""
        log_event(logger, "recovered", self.id, parts_ms=parts_ms)
        self._meter.recovered(parts_ms)
        await self.connection.send(protocol.Recovered(dict(parts_ms)))

    async def announce_draining(self) -> None:
        """This replica is being replaced. A client that has gone does not need to know."""
        if self.stream is not None and self._hello.mode == "live":
            told = "this part of the server is being replaced: connect again with your token, then leave"
            with contextlib.suppress(WebSocketDisconnect, ConnectionError, ProtocolError, RuntimeError):
                await self.connection.send(protocol.Notice("draining", told))

    @property
    def has_ended(self) -> bool:
        """Whether the client has said that nothing more comes, and got all of it."""
        return self._intake is not None and self._intake.is_used_up

    @property
    def state(self) -> str:
        """For the status."""
        if self.is_queued:
            return "queued"
        if self.stream is not None and self.stream.is_recovering:
            return "recovering"
        return "idle" if self.is_idle else "live"

    def status(self, replica: str) -> dict[str, Any]:
        """This session's part of `/v1/status`."""
        now_s = time.monotonic()
        return {
            "id": self.id,
            "replica": replica,
            "state": self.state,
            "fps": self._delays.fps(now_s),
            "delay_ms": self._delays.delay_ms(now_s),
            "num_recoveries": 0 if self.stream is None else self.stream.num_recoveries,
        }

    def log_end(self, code: str) -> None:
        """What is left to say of a session that is over."""
        ended = self._statistics()
        self._meter.count(ended.frames_received, ended.frames_sent, ended.dropped)
        self._meter.ended(code)
        log_event(
            logger,
            "ended",
            self.id,
            code=code,
            seconds=round(time.monotonic() - self._started_s, 1),
            frames_in=ended.frames_received,
            frames_out=ended.frames_sent,
            dropped=ended.dropped,
            delay_ms=self._delays.delay_ms(time.monotonic()),
        )

    async def _portrait(self, size_px: int) -> Pixels:
        data, self._portrait_file = self._portrait_file, b""
        loop = asyncio.get_running_loop()
        # Who has left already is noticed meanwhile.
        await asyncio.sleep(FIRST_LOOK_S)
        async with self._portraits.turn():
            return await loop.run_in_executor(self._portrait_thread, _load_portrait, self._hello, data, size_px)

    async def _pipeline(self) -> Pipeline:
        connecting = asyncio.ensure_future(self._connect())
        try:
            done, _ = await asyncio.wait([connecting], timeout=NOTICE_S)
            if not done:
                await self.connection.send(protocol.Notice("loading", "the model is being loaded, please wait"))
            return await connecting
        finally:
            connecting.cancel()

    async def _say_ready(self, token: str, is_resumed: bool, config: ModelConfig, credit: int) -> None:
        self._granted = credit
        log_event(logger, "resumed" if is_resumed else "ready", self.id)
        ready = protocol.Ready(
            session=self.id,
            size_px=config.size_px,
            chunk_frames=config.window.chunk_frames,
            num_levels=config.window.num_levels,
            delay_frames=config.window.num_transition_frames,
            fps=self._settings.max_fps,
            credit=credit,
            max_message_bytes=protocol.MAX_MESSAGE_BYTES,
            max_bytes_per_s=self._settings.max_input_bytes_per_s,
            idle_timeout_s=self._settings.idle_timeout_s,
            token=token if self._hello.mode == "live" else None,
            resumed=is_resumed,
        )
        await self.connection.send(ready)

    async def _feed(self, stream: Stream, intake: Intake, delivery: Delivery, size_px: int) -> None:
        """Lets chunks into the pipeline as long as there is credit, and after the client's end the tail."""
        calls: list[asyncio.Task[Decoded]] = []
        try:
            while not intake.is_used_up:
                self._changed.clear()
                chunk = None
                if delivery.may_accept:
                    async with self._decoding_turn(intake):
                        chunk = await self._next_chunk(intake, delivery, size_px)
                if chunk is not None:
                    stamps, frames = chunk
                    await self._take_place(stream)
                    delivery.accept()
                    call = asyncio.create_task(stream.run(frames, self._due_s(stamps, delivery)))
                    calls = [*(call for call in calls if not call.done()), call]
                    self._calls.put_nowait((stamps, call))
                elif not intake.is_used_up:
                    await self._wait_for_change(stream, delivery)
            self._calls.put_nowait(None)
            await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def _due_s(self, stamps: list[Stamp], delivery: Delivery) -> float:
        """When the chunk's result should be there: a chunk period after its newest frame came. Wall clock."""
        arrived_s = stamps[-1].received_s if stamps else time.monotonic()
        return time.time() - time.monotonic() + arrived_s + (delivery.pace.period_s or 0.0)

    async def _wait_for_change(self, stream: Stream, delivery: Delivery) -> None:
        """Until something has come that may make a chunk. Who brings nothing for long gives the place to others, and
        is closed when nothing comes for much longer. Raises ProtocolError `idle`.
        """
        limit_s = self._settings.pause_timeout_s if self.is_idle else self._settings.idle_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._changed.wait()
        except TimeoutError:
            if self.is_idle:
                told = f"no frames came for more than {limit_s:g} s: begin a new session when there are some"
                raise ProtocolError(told, "idle") from None
            if not delivery.owes_output:
                await stream.rest()
                self.is_idle = True
                log_event(logger, "idle", self.id)

    async def _take_place(self, stream: Stream) -> None:
        """Asks for the place again that was given to others."""
        if self.is_idle:
            await stream.wake()
            self.is_idle = self.is_queued = False

    def _decoding_turn(self, intake: Intake) -> contextlib.AbstractAsyncContextManager[None]:
        """Before frames are chosen, so that those that wait for it are the freshest then."""
        return self._large_frames.turn() if intake.chunk_pixels > MANY_PIXELS else contextlib.nullcontext()

    async def _next_chunk(self, intake: Intake, delivery: Delivery, size_px: int) -> tuple[list[Stamp], Pixels] | None:
        """The next chunk of whole frames, decoded; the client is told of the damaged ones."""
        while (frames := intake.take_out(time.monotonic(), delivery.pace.period_s)) is not None:
            decoded = await asyncio.to_thread(decode_frames, frames, self._hello.codec, size_px)
            pictures = [picture for picture in decoded if not isinstance(picture, ProtocolError)]
            if len(pictures) == len(frames):
                return intake.use(pictures)
            intake.give_back([isinstance(picture, ProtocolError) for picture in decoded])
            for damage in decoded:
                if isinstance(damage, ProtocolError):
                    await self._refuse(damage)
        return None

    async def _collect(self, delivery: Delivery) -> None:
        """Takes results in the order of their calls and hands their pictures to the sender."""
        while (entry := await self._calls.get()) is not None:
            stamps, call = entry
            for output in delivery.decoded(stamps, await call, time.monotonic()):
                self._outputs.put_nowait(output)
            self._count()
            self._changed.set()
            await self._grant()
        self._outputs.put_nowait(None)

    async def _send_outputs(self, delivery: Delivery) -> None:
        """Sends every picture when it is due."""
        while (output := await self._outputs.get()) is not None:
            await asyncio.sleep(output.due_s - time.monotonic())
            payload = await asyncio.to_thread(encode, output.rgb, self._hello.codec, self._hello.quality)
            message = self._described(output, delivery.num_sent)
            delivery.sent(output, time.monotonic())
            await self.connection.send(message, payload)
            if message.server_ms is not None:
                self._metrics.server_ms(message.server_ms)

    def _described(self, output: Output, index: int) -> protocol.OutputFrame:
        source = output.source
        return protocol.OutputFrame(
            index=index,
            seq=None if source is None else source.seq,
            capture_ms=None if source is None else source.capture_ms,
            no_face=output.no_face,
            server_ms=None if source is None else round((time.monotonic() - source.received_s) * 1000, 2),
            stage_ms={stage: round(float(ms), 2) for stage, ms in output.stage_ms.items()},
            dropped={} if self._intake is None else dict(+self._intake.dropped),
            width=output.rgb.shape[1],
            height=output.rgb.shape[0],
        )

    def _count(self) -> None:
        if self._intake is not None and self._delivery is not None:
            self._meter.count(self._intake.num_received, self._delivery.num_sent, self._intake.dropped)

    async def _grant(self) -> None:
        """Tells a lossless client when it may send more."""
        if self._hello.mode == "lossless" and self._delivery is not None and self._delivery.credit > self._granted:
            self._granted = self._delivery.credit
            await self.connection.send(protocol.Credit(self._granted))

    def _statistics(self) -> protocol.Ended:
        if self._intake is None or self._delivery is None:
            return protocol.Ended(0, 0, 0, {})
        self._intake.drop_pending()
        intake = self._intake
        return protocol.Ended(intake.num_received, intake.num_used, self._delivery.num_sent, dict(+intake.dropped))


def session_id(token: str) -> str:
    """The name under which a session is known to everybody but its client."""
    return hashlib.sha256(token.encode()).hexdigest()[:32]


def _load_portrait(hello: protocol.Hello, payload: bytes, size_px: int) -> Pixels:
    if hello.portrait is None and not payload:
        raise ProtocolError("hello names no portrait and carries none: give a name or the file's bytes", "bad_portrait")
    data = payload if hello.portrait is None else portraits.read_bundled_portrait(hello.portrait)
    return portraits.load_portrait(data, size_px)
