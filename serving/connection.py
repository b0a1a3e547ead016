"""A client's websocket with bounds: how long it may be silent, how much it may send, how long it may leave unread.

Called by `serving.session`. Serve's proxy reads and buffers without bound, so nothing here may wait for the pipeline.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.websockets import WebSocket, WebSocketDisconnect

from serving import protocol
from serving.protocol import ProtocolError
from serving.settings import Settings

BYTES_PER_MESSAGE = 16 * 2**10
"""What every message counts besides its bytes: a flood of tiny ones is a flood."""
BUDGET_S = 0.25
"""Bursts up to so many seconds' worth of input are no flood. What a flood sends until it is noticed lies in memory."""
FINISH_S = 2.0
"""For the last word and the closing of a socket whose other side may have gone."""


class Connection:
    """Messages in and out of one accepted websocket."""

    def __init__(self, socket: WebSocket, settings: Settings):
        self._socket = socket
        self._budget = Budget(settings.max_input_bytes_per_s)
        self._bytes_per_s = settings.max_input_bytes_per_s
        self._send_timeout_s = settings.idle_timeout_s

    async def receive(self, timeout_s: float) -> str | bytes:
        """The next message. Raises ProtocolError `idle` or `flooding`, and WebSocketDisconnect."""
        try:
            async with asyncio.timeout(timeout_s):
                event = await self._socket.receive()
        except TimeoutError:
            raise ProtocolError(f"nothing was said for {timeout_s:g} s: send frames, or pings", "idle") from None
        if event["type"] != "websocket.receive":
            raise WebSocketDisconnect(event.get("code", 1006))
        data: str | bytes = event.get("bytes") or event.get("text") or ""
        if not self._budget.spend(len(data) + BYTES_PER_MESSAGE, time.monotonic()):
            told = f"more than {self._bytes_per_s} bytes a second came in"
            raise ProtocolError(f"{told}: send fewer or smaller frames", "flooding")
        return data

    async def send(self, message: protocol.ServerMessage, payload: bytes = b"") -> None:
        """Sends a message. Raises ProtocolError `stalled` when the client does not read, and WebSocketDisconnect."""
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._send(message, payload)
        except TimeoutError:
            raise ProtocolError("nothing was read for too long: read what is sent", "stalled") from None
        except RuntimeError:
            # The transport has closed the socket by itself, as for text that is no UTF-8.
            raise WebSocketDisconnect(1006) from None

    async def finish(self, message: protocol.ServerMessage | None) -> None:
        """The last word, if any, and the end of the socket, which may be gone already."""
        with contextlib.suppress(TimeoutError, WebSocketDisconnect, ConnectionError, RuntimeError):
            async with asyncio.timeout(FINISH_S):
                if message is not None:
                    await self._send(message, b"")
                await self._socket.close()

    async def _send(self, message: protocol.ServerMessage, payload: bytes) -> None:
        data = protocol.pack(message, payload)
        await (self._socket.send_text(data) if isinstance(data, str) else self._socket.send_bytes(data))


class Budget:
    """How many bytes a client may still send: refilled by time, never above `BUDGET_S` seconds' worth."""

    def __init__(self, bytes_per_s: int):
        self._bytes_per_s = bytes_per_s
        # One whole message must always fit, however small the rate.
        self._capacity = max(BUDGET_S * bytes_per_s, 2.0 * protocol.MAX_MESSAGE_BYTES)
        self._left, self._at_s = self._capacity, float("-inf")

    def spend(self, num_bytes: int, now_s: float) -> bool:
        """Whether so many bytes were allowed at this time."""
        self._left = min(self._capacity, self._left + (now_s - self._at_s) * self._bytes_per_s) - num_bytes
        self._at_s = now_s
        return self._left >= 0
