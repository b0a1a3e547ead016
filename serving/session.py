"""One person's stream on the server, from hello to end. Called by `serving.application` for every websocket.

Four tasks: the reader never waits for the pipeline; the feeder lets chunks in when there is credit; the collector takes
results in order; the sender paces them. Their state and choices are in `serving.intake` and `serving.delivery`; here is
the I/O. Pictures are decoded and encoded in threads, since all sessions of a replica share its event loop. The pipeline
is known only as the protocols below: no Ray, no torch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from serving import protocol
from serving.codec import encode
from serving.connection import Connection
from serving.delivery import Decoded, Delivery, Output
from serving.flow import Stamp
from serving.intake import Intake, decode_frames
from serving.protocol import ProtocolError
from serving.settings import Settings
from serving.tasks import all_of, first_to_end
from stages import portraits
from stages.config import ModelConfig
from stages.errors import UserError
from stages.messages import Pixels

logger = logging.getLogger("ray.serve")

PONG_INTERVAL_S = 0.1
NOTICE_S = 1.0
"""Who waits longer than this for the model is told why."""


class Stream(Protocol):
    """A session of the pipeline; `cluster.session.Session` is one."""

    id: str

    async def run(self, frames: Pixels) -> Decoded:
        """Several calls may be in flight; results come in the order of the calls."""

    async def close(self) -> None: ...


class Pipeline(Protocol):
    """Opens streams; `cluster.session.Pool` is one."""

    config: ModelConfig

    async def open(self, portrait: Pixels, seed: int) -> Stream: ...


async def serve_session(
    socket: WebSocket, connect: Callable[[], Awaitable[Pipeline]], settings: Settings, portrait_thread: Executor
) -> None:
    """Talks with one client until it leaves, ends or is refused. Whatever a client does, this does not raise.

    `connect` gives the pipeline, and may take as long as weights take to load. `portrait_thread` is the replica's
    one thread for portraits: they may have 40 megapixels, so they are decoded one at a time, and not among frames.
    """
    connection = Connection(socket, settings)
    last: protocol.ServerMessage | None = None
    session = Session(connection, connect, settings, portrait_thread)
    try:
        last = await session.run()
    except (WebSocketDisconnect, ConnectionError):
        logger.info("session %s: the client has gone", session.id)
    except UserError as error:
        logger.info("session %s ends: %s: %s", session.id, error.code, error)
        last = protocol.Error(error.code, str(error)[:2000], fatal=True)
    except Exception:
        logger.exception("session %s failed", session.id)
        last = protocol.Error("internal", "the server failed, and its log says why: try again", fatal=True)
    await connection.finish(last)


class Session:
    """The four tasks of one stream, and what they share. One event loop, so no locks."""

    def __init__(
        self,
        connection: Connection,
        connect: Callable[[], Awaitable[Pipeline]],
        settings: Settings,
        portrait_thread: Executor,
    ):
        self.id = "-"
        self._connection, self._connect, self._settings = connection, connect, settings
        self._portrait_thread = portrait_thread
        self._hello = protocol.Hello(protocol=protocol.PROTOCOL)
        self._portrait_file = b""
        self._intake: Intake | None = None
        self._delivery: Delivery | None = None
        self._num_refused = 0
        self._next_pong_s = float("-inf")
        self._granted = 0
        self._changed = asyncio.Event()
        self._calls: asyncio.Queue[tuple[list[Stamp], asyncio.Task[Decoded]] | None] = asyncio.Queue()
        self._outputs: asyncio.Queue[Output | None] = asyncio.Queue()

    async def run(self) -> protocol.Ended:
        """Returns the statistics when the client has said bye, or when everything has been sent after its end."""
        message, payload = protocol.parse_client(await self._connection.receive(self._settings.hello_timeout_s))
        if not isinstance(message, protocol.Hello):
            raise ProtocolError(f"{message.type!r} came before hello: say hello first", "not_hello")
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
                return await self._connection.receive(self._settings.idle_timeout_s)
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
                self._delivery.shown(message.count, time.monotonic())
                await self._grant()
            case protocol.End():
                self._intake.end()
        self._changed.set()

    async def _answer(self, ping: protocol.Ping) -> None:
        """Not every one of a flood: answers that a client does not read would pile up before it."""
        if time.monotonic() >= self._next_pong_s:
            self._next_pong_s = time.monotonic() + PONG_INTERVAL_S
            await self._connection.send(protocol.Pong(ping.client_ms, time.time() * 1000))

    async def _refuse(self, error: ProtocolError) -> None:
        """Tells the client; ends the session where the protocol says so."""
        self._num_refused += 1
        is_last = self._hello.mode == "lossless" or self._num_refused > protocol.MAX_NUM_REFUSED
        if error.code in protocol.ENDING_CODES or is_last:
            raise error
        await self._connection.send(protocol.Error(error.code, str(error), fatal=False))

    async def _work(self) -> None:
        """Opens the stream, says ready, and runs it to its end."""
        pipeline = await self._pipeline()
        stream = await pipeline.open(await self._portrait(pipeline.config.size_px), self._hello.seed)
        try:
            intake = Intake(self._hello, pipeline.config)
            delivery = Delivery(pipeline.config.window, self._hello.mode, self._settings.max_chunks_in_flight)
            self._intake, self._delivery = intake, delivery
            await self._say_ready(stream.id, pipeline.config, delivery.credit)
            size_px = pipeline.config.size_px
            feeding = self._feed(stream, intake, delivery, size_px)
            await all_of(feeding, self._collect(delivery), self._send_outputs(delivery))
        finally:
            await stream.close()

    async def _portrait(self, size_px: int) -> Pixels:
        data, self._portrait_file = self._portrait_file, b""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._portrait_thread, _load_portrait, self._hello, data, size_px)

    async def _pipeline(self) -> Pipeline:
        connecting = asyncio.ensure_future(self._connect())
        try:
            done, _ = await asyncio.wait([connecting], timeout=NOTICE_S)
            if not done:
                await self._connection.send(protocol.Notice("loading", "the model is being loaded, please wait"))
            return await connecting
        finally:
            connecting.cancel()

    async def _say_ready(self, session: str, config: ModelConfig, credit: int) -> None:
        self.id, self._granted = session, credit
        logger.info("session %s: %s, %s, seed %d", session, self._hello.mode, self._hello.codec, self._hello.seed)
        ready = protocol.Ready(
            session=session,
            size_px=config.size_px,
            chunk_frames=config.window.chunk_frames,
            num_levels=config.window.num_levels,
            delay_frames=config.window.num_transition_frames,
            fps=self._settings.max_fps,
            credit=credit,
            max_message_bytes=protocol.MAX_MESSAGE_BYTES,
            max_bytes_per_s=self._settings.max_input_bytes_per_s,
            idle_timeout_s=self._settings.idle_timeout_s,
        )
        await self._connection.send(ready)

    async def _feed(self, stream: Stream, intake: Intake, delivery: Delivery, size_px: int) -> None:
        """Lets chunks into the pipeline as long as there is credit, and after the client's end the tail."""
        calls: list[asyncio.Task[Decoded]] = []
        try:
            while not intake.is_used_up:
                self._changed.clear()
                chunk = await self._next_chunk(intake, delivery, size_px) if delivery.may_accept else None
                if chunk is not None:
                    stamps, frames = chunk
                    delivery.accept()
                    calls = [*(call for call in calls if not call.done()), asyncio.create_task(stream.run(frames))]
                    self._calls.put_nowait((stamps, calls[-1]))
                elif not intake.is_used_up:
                    await self._changed.wait()
            self._calls.put_nowait(None)
            await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

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
            self._changed.set()
            await self._grant()
        self._outputs.put_nowait(None)

    async def _send_outputs(self, delivery: Delivery) -> None:
        """Sends every picture when it is due."""
        while (output := await self._outputs.get()) is not None:
            await asyncio.sleep(output.due_s - time.monotonic())
            payload = await asyncio.to_thread(encode, output.rgb, self._hello.codec, self._hello.quality)
            message = self._described(output, delivery.num_sent)
            delivery.sent(time.monotonic())
            await self._connection.send(message, payload)

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

    async def _grant(self) -> None:
        """Tells a lossless client when it may send more."""
        if self._hello.mode == "lossless" and self._delivery is not None and self._delivery.credit > self._granted:
            self._granted = self._delivery.credit
            await self._connection.send(protocol.Credit(self._granted))

    def _statistics(self) -> protocol.Ended:
        if self._intake is None or self._delivery is None:
            return protocol.Ended(0, 0, 0, {})
        self._intake.drop_pending()
        intake = self._intake
        return protocol.Ended(intake.num_received, intake.num_used, self._delivery.num_sent, dict(+intake.dropped))


def _load_portrait(hello: protocol.Hello, payload: bytes, size_px: int) -> Pixels:
    if hello.portrait is None and not payload:
        raise ProtocolError("hello names no portrait and carries none: give a name or the file's bytes", "bad_portrait")
    data = payload if hello.portrait is None else portraits.read_bundled_portrait(hello.portrait)
    return portraits.load_portrait(data, size_px)
