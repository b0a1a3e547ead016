"""A client's connections to `/v1/stream`: one of them, and a lasting line of several, with the errors that end them.

Called by `serving.client`. What the messages mean for frames and receipts is not known here. No Ray, no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from serving import protocol
from stages.errors import UserError

OPEN_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 2.0
"""A server that does not answer the farewell is left without it."""
PING_S = 2.0
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
"""The pause before a try to connect again doubles from the first to this."""


def now_ms() -> float:
    """The client's clock: capture times, receipts, pings, events."""
    return time.perf_counter() * 1000


class ServerError(UserError):
    """The server ended the session. `code` is from the table in docs/protocol.md."""

    def __init__(self, message: str, code: str | None = None, retry_s: float | None = None):
        super().__init__(message, code)
        self.retry_s = retry_s
        """After how long another try may succeed; None: it would end the same way."""


class UnreachableError(UserError):
    """There is no server, or it went away without a word."""

    code = "no_connection"
    retry_s: float | None = 0.0


class Event(NamedTuple):
    """Something that happened to a session beside its frames."""

    at_ms: float
    """On the clock of `now_ms`."""
    name: str
    """`queued`, `recovering`, `recovered`, `draining`, `lost` (the connection) or `reconnected`."""
    detail: Any
    """`queued`: position and estimate_s. `recovered`: parts_ms. `reconnected`: resumed. The others: a sentence."""


class Line:
    """A connection on which hello was said and ready was heard, with what is counted per connection."""

    def __init__(self, url: str, socket: ClientConnection):
        self._url, self._socket = url, socket
        self.ready: protocol.Ready
        self.num_shown = 0
        self.dropped: Mapping[str, int] = {}
        """Driving frames that the server has dropped, by reason, as it said last."""

    async def receive(self) -> tuple[protocol.ServerMessage, memoryview]:
        """The next message and its payload. Raises ServerError for a fatal error, UnreachableError, ProtocolError."""
        with _no_connection(self._url):
            message, payload = protocol.parse_server(await self._socket.recv())
        if isinstance(message, protocol.Error) and message.fatal:
            raise ServerError(message.message, message.code, message.retry_s)
        return message, payload

    async def send(self, message: protocol.ClientMessage, payload: bytes = b"") -> bool:
        """Whether there was still a connection to send on.

        Nothing is raised: `receive` knows better why, since the server's last word may still lie unread.
        """
        try:
            await self._socket.send(protocol.pack(message, payload))
        except ConnectionClosed:
            return False
        return True

    async def close(self) -> None:
        """Ends the connection; what the server had sent before can still be received."""
        await self._socket.close()


async def open_line(
    url: str, hello: protocol.Hello, portrait_file: bytes, on_remark: Callable[[protocol.ServerMessage], None]
) -> Line:
    """Connects, says hello and waits for ready, as long as the server lets it wait; `on_remark` gets what comes before.

    Raises UnreachableError, ServerError and ProtocolError.
    """
    with _no_connection(url):
        socket = await connect(
            url,
            max_size=4 * protocol.MAX_MESSAGE_BYTES,
            compression=None,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
        )
    line = Line(url, socket)
    try:
        await line.send(hello, portrait_file)
        while not isinstance(message := (await line.receive())[0], protocol.Ready):
            on_remark(message)
    except BaseException:
        # Without a farewell the server would keep the session's place for a while.
        await line.send(protocol.Bye())
        await line.close()
        raise
    line.ready = message
    return line


class LastingLine:
    """One line after another, as if they were one. `receive` in one task, `send` from any.

    When a connection breaks, or its replica is being replaced, the next one is opened with the last one's token. It is
    given up when nothing was heard for `reconnect_s` (0: at once). `on_remark` gets what comes before ready.
    """

    def __init__(
        self,
        url: str,
        hello: protocol.Hello,
        portrait_file: bytes,
        reconnect_s: float,
        on_remark: Callable[[protocol.ServerMessage], None],
    ):
        self.events: list[Event] = []
        self.num_reconnects = 0
        self._url, self._hello, self._portrait_file = url, hello, portrait_file
        self._reconnect_s, self._on_remark = reconnect_s, on_remark
        self._current: Line
        """The one to send on."""
        self._read: Line
        """The one to receive from: the one before, until it has been read to its end."""
        self._next: asyncio.Task[Line] | None = None
        """On its way to follow the one that is read."""
        self._pinging: asyncio.Task[None]
        self._is_alive = True
        """Whether there was a sign of life since a connection was lost."""
        self._alive_ms = 0.0
        """The newest sign of life, or when after one a connection was lost."""
        self._rtt_ms: float | None = None
        self._is_ending = False

    @property
    def ready(self) -> protocol.Ready:
        """What the server said about the connection on which frames go out."""
        return self._current.ready

    async def open(self) -> None:
        """Opens the first connection. Raises UnreachableError, ServerError and ProtocolError."""
        self._current = self._read = await self._open()
        self._alive_ms = now_ms()
        self._pinging = asyncio.create_task(self._ping())

    async def receive(self) -> tuple[Line, protocol.ServerMessage, memoryview]:
        """The next message, and on which line it came. Raises what `Line.receive` raises, if no line may follow."""
        while True:
            try:
                message, payload = await self._read.receive()
            except UserError as error:
                self._read = await self._line_after(error)
            else:
                self._hear(message)
                if isinstance(message, protocol.Notice) and message.code == "draining" and self._has_time():
                    self._seek_next()
                return self._read, message, payload

    async def send(self, message: protocol.ClientMessage, payload: bytes = b"") -> bool:
        """Whether there is a connection at the moment; without one the message is lost."""
        return await self._current.send(message, payload)

    async def end(self) -> None:
        """Says that no more frames come, also on a connection that follows."""
        self._is_ending = True
        await self.send(protocol.End())

    async def close(self) -> None:
        """Says bye and ends the connection, or the search for one."""
        tasks = [task for task in (self._pinging, self._next) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.send(protocol.Bye())
        await self._current.close()

    async def _line_after(self, error: UserError) -> Line:
        """The line that follows the one that is read, which has ended. Raises the error where none may follow."""
        is_broken = isinstance(error, UnreachableError)
        if self._is_alive:
            # A silent connection may have been dead for long before that was noticed.
            self._is_alive, self._alive_ms = False, now_ms()
        if self._next is None and not (is_broken and self._has_time()):
            raise error
        if is_broken and self._read is self._current:
            self._note("lost", str(error))
        try:
            return await self._seek_next()
        finally:
            self._next = None

    def _seek_next(self) -> asyncio.Task[Line]:
        if self._next is None:
            self._next = asyncio.create_task(self._move())
        return self._next

    async def _move(self) -> Line:
        """Opens the next line and sends on it from then on; only then leaves the old one."""
        line = await self._open_again()
        old, self._current, self._rtt_ms = self._current, line, None
        self.num_reconnects += 1
        self._note("reconnected", {"resumed": line.ready.resumed})
        if self._is_ending:
            await line.send(protocol.End())
        if not line.ready.resumed:
            # Or its place would be kept.
            await old.send(protocol.Bye())
        await old.close()
        return line

    async def _open_again(self) -> Line:
        """Tries until it works, or until nothing was heard for too long; then raises what the last try raised."""
        pause_s = wait_s = FIRST_PAUSE_S
        while True:
            await asyncio.sleep(wait_s)
            try:
                return await self._open()
            except (UnreachableError, ServerError) as error:
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                wait_s = max(pause_s, error.retry_s or 0.0)
                if error.retry_s is None or not self._has_time(wait_s):
                    raise

    def _has_time(self, wait_s: float = 0.0) -> bool:
        """Whether so much later it is still not given up."""
        return now_ms() + wait_s * 1000 < self._alive_ms + self._reconnect_s * 1000

    async def _open(self) -> Line:
        line = await open_line(self._url, self._hello, self._portrait_file, self._take_remark)
        self._hello = replace(self._hello, resume=line.ready.token)
        return line

    def _take_remark(self, message: protocol.ServerMessage) -> None:
        self._hear(message)
        self._on_remark(message)

    def _hear(self, message: protocol.ServerMessage) -> None:
        """Notes signs of life and events. Other messages, such as ready, do not show that anything goes on."""
        if isinstance(message, protocol.OutputFrame | protocol.Pong | protocol.Queued):
            self._is_alive, self._alive_ms = True, now_ms()
        match message:
            case protocol.Pong():
                self._rtt_ms = now_ms() - message.client_ms
            case protocol.Queued():
                self._note("queued", {"position": message.position, "estimate_s": message.estimate_s})
            case protocol.Recovered():
                self._note("recovered", message.parts_ms)
            case protocol.Notice(code="recovering" | "draining"):
                self._note(message.code, message.message)

    def _note(self, name: str, detail: Any) -> None:
        self.events.append(Event(now_ms(), name, detail))

    async def _ping(self) -> None:
        while True:
            # Whoever has nothing to send for a moment is not idle, however soon the server loses patience.
            await asyncio.sleep(min(PING_S, self.ready.idle_timeout_s / 3))
            await self.send(protocol.Ping(now_ms(), self._rtt_ms))


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
