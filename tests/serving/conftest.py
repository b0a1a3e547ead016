"""A real server on a real socket, with a pipeline that echoes its input after the structural delay."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import uvicorn
from websockets.asyncio.server import serve

from serving import protocol
from serving.codec import encode
from serving.metrics import IngressMetrics
from serving.replica import Replica
from serving.routes import Backend, build_api
from serving.settings import Settings
from stages.config import ModelConfig, UNetConfig, WindowConfig
from stages.errors import BadPortrait


@dataclass(frozen=True)
class EchoedChunk:
    frames: np.ndarray
    no_face: tuple[bool, ...]
    stage_ms: dict[str, float]


@dataclass
class EchoStream:
    """Gives back each chunk `num_levels - 1` calls later; before that, the portrait. A black frame has no face."""

    pool: "EchoPool"
    portrait: np.ndarray
    id: str
    num_recoveries: int = 0
    is_recovering: bool = False
    is_idle: bool = False
    parked: bool = False
    num_calls: int = 0
    in_flight: int = 0
    closed: bool = False
    entered: list = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, frames, due_s=None):
        assert not self.is_idle
        window = self.pool.config.window
        assert frames.shape == (window.chunk_frames, *self.portrait.shape)
        self.num_calls += 1
        self.in_flight += 1
        self.pool.max_in_flight = max(self.pool.max_in_flight, self.in_flight)
        self.entered.append(frames)
        number = len(self.entered) - 1
        async with self.turn:
            await asyncio.sleep(self.pool.chunk_s)
        self.in_flight -= 1
        if self.num_calls > self.pool.fail_after:
            raise self.pool.failure
        source = number - (window.num_levels - 1)
        shown = self.entered[source] if source >= 0 else np.stack([self.portrait] * window.chunk_frames)
        return EchoedChunk(shown, tuple(bool(frame.max() == 0) for frame in frames), {"denoise": 1.0})

    async def rest(self):
        self.is_idle = True

    async def wake(self):
        await asyncio.sleep(self.pool.wake_s)
        self.is_idle = False

    def park(self, seconds):
        self.parked = True
        self.pool.parked[self.id] = self

    async def close(self):
        self.closed = True


@dataclass
class EchoPool:
    config: ModelConfig
    chunk_s: float = 0.0
    connect_s: float = 0.0
    open_s: float = 0.0
    wake_s: float = 0.0
    refusal: Exception | None = None
    line: list[tuple[int, float]] = field(default_factory=list)
    places: int = 10**9
    parked: dict[str, EchoStream] = field(default_factory=dict)
    fail_after: int = 10**9
    failure: Exception = field(default_factory=lambda: RuntimeError("the pipeline broke"))
    max_in_flight: int = 0
    streams: list[EchoStream] = field(default_factory=list)

    async def open(self, portrait, seed, session, listener):
        for position, estimate_s in self.line:
            await listener.queued(position, estimate_s)
        if self.refusal is not None:
            raise self.refusal
        while sum(not stream.closed for stream in self.streams) >= self.places:
            await listener.queued(1, 9.0)
            await asyncio.sleep(0.05)
        await asyncio.sleep(self.open_s)
        if portrait.max() == 0:
            raise BadPortrait("the portrait shows no face: take another picture")
        self.streams.append(EchoStream(self, portrait, session))
        return self.streams[-1]

    async def resume(self, session, portrait, listener):
        return self.parked.pop(session, None)


def tiny_config(chunk_frames=3, num_levels=4, size_px=64):
    window = WindowConfig(chunk_frames=chunk_frames, timesteps=tuple(range(num_levels)))
    return ModelConfig(name="echo", size_px=size_px, window=window, unet=UNetConfig(max_positions=64))


@dataclass
class EchoServer:
    url: str
    pool: EchoPool
    replica: Replica

    async def until_closed(self):
        """Waits until every stream has given its place back."""
        async with asyncio.timeout(3):
            while not all(stream.closed or stream.parked for stream in self.pool.streams):
                await asyncio.sleep(0.01)


@pytest.fixture
async def echo_server():
    """A function that starts a server: `await echo_server(settings, chunk_s=...)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(settings=None, config=None, **behaviour):
            pool = EchoPool(config or tiny_config(), **behaviour)

            async def connect():
                await asyncio.sleep(pool.connect_s)
                return pool

            @contextlib.asynccontextmanager
            async def held(api):
                yield

            async def house():
                return {"replicas": [replica.describe()], "places": pool.places}

            replica = Replica("echo", IngressMetrics())
            api = build_api(Backend(connect, lambda: None, held, house), settings or Settings(), replica)
            server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="warning", ws_max_size=2**24))
            running = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)

            async def stop():
                server.should_exit = server.force_exit = True
                await running

            stack.push_async_callback(stop)
            port = server.servers[0].sockets[0].getsockname()[1]
            return EchoServer(f"ws://127.0.0.1:{port}/v1/stream", pool, replica)

        yield start


@pytest.fixture
def portrait():
    """A portrait file's bytes."""
    return encode(np.full((80, 80, 3), 200, dtype=np.uint8), "png")


@dataclass
class ScriptedServer:
    """A socket that says what a test wants to be said, such as what the real server says only in trouble."""

    url: str
    hellos: list[protocol.Hello] = field(default_factory=list)
    portrait_files: list[bytes] = field(default_factory=list)


@pytest.fixture
async def scripted_server():
    """A function that starts one: after hello, the n-th connection is the n-th handler's, later ones the last's."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*handlers):
            scripted = ScriptedServer("")

            async def handle(socket):
                hello, portrait_file = protocol.parse_client(await socket.recv())
                scripted.hellos.append(hello)
                scripted.portrait_files.append(bytes(portrait_file))
                await handlers[min(len(scripted.hellos), len(handlers)) - 1](socket)

            server = await stack.enter_async_context(serve(handle, "127.0.0.1", 0))
            scripted.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/stream"
            return scripted

        yield start


async def say(socket, *messages):
    """What a handler says."""
    for message in messages:
        await socket.send(protocol.pack(message))


def saying(*messages):
    """A handler that says this and then listens until the client leaves."""

    async def handle(socket):
        await say(socket, *messages)
        await socket.wait_closed()

    return handle
