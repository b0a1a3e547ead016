"""One run of the load generator: sessions that play a video while something happens to the server.

Called by `serving.bench.runs`. All is one event loop in one process, light enough for a machine that the server needs:
driving frames are encoded beforehand, and of the output only samples are decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.bench import server as bench_server
from serving.bench.faces import Face, distinct_faces, shows
from serving.bench.log import Log, Output, Plan, SessionLog
from serving.bench.server import Server
from serving.client import Client, ReceivedOutput
from serving.codec import encode
from serving.line import now_ms
from serving.tasks import first_to_end
from stages.errors import UserError
from stages.video import read_video, square_resize

MAX_FILM_S = 60.0
"""So much of a video is kept in memory; then it begins again."""
DEFAULT_FPS = 25.0
"""Of a video with a single frame."""
OPEN_S = 120.0
RECONNECT_S = 120.0
SAMPLE_S = 5.0
CHECK_EVERY = 10
"""Output frames, of which one is looked at."""
NUM_CHECKED_AFTER_EVENT = 8
"""All of the first frames behind an interruption are: there a mistake would show."""


class NotOpened(UserError):
    """A session did not get its place."""

    code = "not_opened"


@dataclass(frozen=True)
class Film:
    """A video as encoded frames, at an even rate."""

    frames: Sequence[bytes]
    fps: float

    def at(self, time_s: float) -> bytes:
        """The frame at a time on the video's clock, which begins again at its end."""
        return self.frames[int(time_s * self.fps) % len(self.frames)]


def load_film(path: Path, size_px: int) -> Film:
    """Reads and encodes a video as the model takes it, up to MAX_FILM_S of it. Raises BadVideo."""
    frames: list[bytes] = []
    times_s: list[float] = []
    for frame in read_video(path):
        frames.append(encode(square_resize(frame.rgb, size_px), "jpeg"))
        times_s.append(frame.time_s)
        if times_s[-1] - times_s[0] >= MAX_FILM_S:
            break
    span_s = times_s[-1] - times_s[0]
    return Film(frames, (len(frames) - 1) / span_s if span_s > 0 else DEFAULT_FPS)


@dataclass
class Player:
    """One session."""

    client: Client
    face: Face
    log: SessionLog

    @property
    def session_id(self) -> str:
        """As `/v1/status` names it."""
        return self.client.ready.session[:8]


@dataclass(frozen=True)
class Playing:
    """A run that is going on."""

    server: Server
    players: Sequence[Player]
    log: Log


During = Callable[[Playing], Coroutine[Any, Any, None]]
"""What happens while the sessions play; the run ends with it."""


async def play(server: Server, plan: Plan, film: Film, during: During) -> Log:
    """Opens the sessions, plays until `during` returns or every session has ended, and leaves. Raises UserError."""
    async with players(server.url, plan.num_sessions) as opened:
        log = Log(plan, opened[0].client.ready.chunk_frames, now_ms(), 0.0, [player.log for player in opened])
        cpu_s = time.process_time()
        try:
            await first_to_end(
                during(Playing(server, opened, log)),
                _all_stream(opened, film, plan.input_fps, log.started_ms),
                _sample_memory(server, log),
            )
        finally:
            log.ended_ms, log.client_cpu_s = log.ended_ms or now_ms(), time.process_time() - cpu_s
            for player in opened:
                player.log.dropped += player.client.dropped + Counter(unsent=player.client.num_unsent)
        await _sample_once(server, log)
    return log


@contextlib.asynccontextmanager
async def players(url: str, num_sessions: int) -> AsyncIterator[list[Player]]:
    """So many open sessions, each with a portrait of its own. Raises UserError."""
    async with contextlib.AsyncExitStack() as stack:
        opened: list[Player] = []
        try:
            async with asyncio.timeout(OPEN_S):
                for face in distinct_faces(num_sessions):
                    client = Client(url, portrait=face.data, decode=False, reconnect_s=RECONNECT_S)
                    await stack.enter_async_context(client)
                    opened.append(Player(client, face, SessionLog(events=client.events)))
        except TimeoutError:
            raise NotOpened(
                f"{len(opened)} of {num_sessions} sessions got a place in {OPEN_S:.0f} s: take fewer, or a target_fps "
                "of 1 on the server"
            ) from None
        yield opened


async def _all_stream(opened: Sequence[Player], film: Film, fps: float, started_ms: float) -> None:
    # Cameras do not keep step with one another.
    offsets_s = [number / len(opened) / fps for number in range(len(opened))]
    faces = [player.face for player in opened]
    await asyncio.gather(
        *(
            _stream(player, film, fps, started_ms, offset_s, faces)
            for player, offset_s in zip(opened, offsets_s, strict=True)
        )
    )


async def _stream(
    player: Player, film: Film, fps: float, started_ms: float, offset_s: float, faces: Sequence[Face]
) -> None:
    """One session to its end. One that fails ends alone."""
    try:
        await first_to_end(_send(player, film, fps, started_ms, offset_s), _receive(player, faces))
    except UserError as error:
        player.log.error = error


async def _send(player: Player, film: Film, fps: float, started_ms: float, offset_s: float) -> None:
    number = 0
    while True:
        due_s = offset_s + number / fps
        late_s = (now_ms() - started_ms) / 1000 - due_s
        if late_s < 0:
            await asyncio.sleep(-late_s)
        elif (num_missed := int(late_s * fps)) > 0:
            # The socket was full, or this process too busy: a camera does not wait either.
            player.log.dropped["unsent"] += num_missed
            number += num_missed
            continue
        await player.client.send_encoded(film.at(due_s))
        number += 1


async def _receive(player: Player, faces: Sequence[Face]) -> None:
    log, num_events, num_behind_event = player.log, 0, 0
    async for output in player.client:
        log.outputs.append(Output(output.received_ms, output.delay_ms))
        if len(player.client.events) != num_events:
            num_events, num_behind_event = len(player.client.events), 0
        num_behind_event += 1
        if num_behind_event <= NUM_CHECKED_AFTER_EVENT or len(log.outputs) % CHECK_EVERY == 0:
            _check(player, output, faces)


def _check(player: Player, output: ReceivedOutput, faces: Sequence[Face]) -> None:
    player.log.num_checked += 1
    player.log.num_wrong += not shows(output.rgb, player.face, faces)


async def _sample_memory(server: Server, log: Log) -> None:
    while True:
        await _sample_once(server, log)
        await asyncio.sleep(SAMPLE_S)


async def _sample_once(server: Server, log: Log) -> None:
    t_s = (now_ms() - log.started_ms) / 1000
    sample = await asyncio.to_thread(bench_server.memory, server, t_s)
    if sample is not None:
        log.memory.append(sample)
