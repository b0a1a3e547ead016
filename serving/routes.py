"""The HTTP and websocket routes of one ingress replica, as a plain FastAPI application. No Ray, no torch.

Called by `serving.application` in every replica, and by tests without Ray.
"""

from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, WebSocket
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from cluster.memory import Releaser
from cluster.threads import yield_to_others
from cluster.turnstile import Turnstile
from serving import protocol
from serving.connection import Connection
from serving.pipeline import Pipeline
from serving.replica import Replica
from serving.session import Session, Surroundings, serve_session
from serving.settings import Settings
from stages.errors import UserError
from stages.portraits import BUNDLED_CLIP, bundled_portraits

PAGE = Path(__file__).parent / "page"
RETRY_S = 10.0
"""When a full replica may be worth another try."""
PORTRAIT_SHARE = 0.2
"""Of a replica's time: so much may go into decoding portraits, a dozen of usual ones a second."""


@dataclass(frozen=True)
class Backend:
    """What the routes need of the replica that they run in."""

    connect: Callable[[], Awaitable[Pipeline]]
    """The pipeline, as soon as it is loaded; raises UserError with the reason when it cannot be."""
    not_ready_because: Callable[[], str | None]
    """Why there is no pipeline yet, as a sentence; None when there is one."""
    held: Callable[[FastAPI], AbstractAsyncContextManager[None]]
    """Connects at its start and gives the pipeline back at its end."""
    house: Callable[[], Awaitable[Mapping[str, Any]]]
    """The whole house, for `/v1/status`."""


def build_api(backend: Backend, settings: Settings, replica: Replica) -> FastAPI:
    """All routes. One replica serves at most `settings.max_sessions` streams at a time; `replica` knows of them."""
    api = FastAPI(title="PersonaLive", lifespan=backend.held, docs_url=None, redoc_url=None)
    api.mount("/static", StaticFiles(directory=PAGE), name="static")
    _add_files(api)
    _add_health(api, backend)
    _add_stream(api, backend, settings, replica)
    return api


def _add_files(api: FastAPI) -> None:
    @api.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @api.get("/status")
    async def status_page() -> FileResponse:
        return FileResponse(PAGE / "status.html", headers={"Cache-Control": "no-cache"})

    @api.get("/v1/portraits")
    async def portraits() -> list[dict[str, str]]:
        return [{"name": name, "url": f"v1/portraits/{name}.png"} for name in bundled_portraits()]

    @api.get("/v1/portraits/{name}.png")
    async def portrait(name: str) -> FileResponse:
        path = bundled_portraits().get(name)
        if path is None:
            raise HTTPException(404, f"there is no bundled portrait {name[:64]!r}")
        return FileResponse(path, media_type="image/png")

    @api.get("/v1/clip.mp4")
    async def clip() -> FileResponse:
        if not BUNDLED_CLIP.exists():
            raise HTTPException(404, "there is no bundled clip in this installation")
        return FileResponse(BUNDLED_CLIP, media_type="video/mp4")


def _add_health(api: FastAPI, backend: Backend) -> None:
    @api.get("/healthz")
    async def alive() -> dict[str, bool]:
        return {"alive": True}

    @api.get("/readyz")
    async def ready() -> JSONResponse:
        reason = backend.not_ready_because()
        return JSONResponse({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)

    @api.get("/v1/status")
    async def status() -> JSONResponse:
        reason = backend.not_ready_because()
        try:
            house = await backend.house()
        except UserError as error:
            return JSONResponse({"ready": False, "reason": reason or str(error)}, 503)
        return JSONResponse({**house, "ready": reason is None, "reason": reason}, headers={"Cache-Control": "no-store"})


def _add_stream(api: FastAPI, backend: Backend, settings: Settings, replica: Replica) -> None:
    # Who has a picture already comes before those who bring a portrait.
    portrait_thread = ThreadPoolExecutor(1, "portrait", yield_to_others)
    portraits, draining = Turnstile(PORTRAIT_SHARE), replica.draining
    surroundings = Surroundings(backend.connect, settings, portrait_thread, portraits, replica.metrics, draining)
    releaser = Releaser()

    @api.websocket("/v1/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        connection = Connection(socket, settings)
        if len(replica.sessions) >= settings.max_sessions:
            busy = f"all {settings.max_sessions} places of this replica are taken: try again later"
            await connection.finish(protocol.Error("busy", busy, fatal=True, retry_s=RETRY_S))
            return
        session = Session(connection, surroundings)
        replica.sessions.add(session)
        try:
            await serve_session(session)
        finally:
            replica.sessions.discard(session)
            releaser.soon()
