"""`serving:app`: the Serve application. One deployment, whose replicas are the ingress and share one pool of members.

Called by `serve run serving:app key=value`, by Serve's YAML (`import_path: serving:app`, settings under `args`), and in
every replica. No `from __future__ import annotations` here: Serve reads the builder's annotation to build the settings.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client

from cluster.memory import freeze, keep_large_buffers_apart
from cluster.session import Pool
from cluster.settings import PoolSettings
from serving.routes import Backend, build_api
from serving.session import Pipeline
from serving.settings import Settings
from stages.errors import UserError

logger = logging.getLogger("ray.serve")

RETRY_S = 30.0
"""A pool that has failed is asked for again at the next hello, but not more often than this."""
OTHER_REQUESTS = 64
"""Places beside the sessions: pages, health checks, and sockets that are told that all is taken."""


class PoolLink:
    """A replica's way to the pool: connects in the background, and again when somebody asks after a failure."""

    def __init__(self, settings: PoolSettings):
        self._settings = settings
        self._connecting: asyncio.Task[Pool] | None = None
        self._failed_s = float("-inf")

    async def get(self) -> Pipeline:
        """The pool, once it is loaded. Raises PoolFailed with the reason."""
        if self._connecting is None or (self._failure() and time.monotonic() - self._failed_s > RETRY_S):
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)

    def not_ready_because(self) -> str | None:
        """Why there is no pool, as a sentence; None when there is one."""
        if self._connecting is None or not self._connecting.done():
            return "the weights are being loaded"
        failure = self._failure()
        return None if failure is None else str(failure)

    @asynccontextmanager
    async def held(self, api: FastAPI) -> AsyncIterator[None]:
        """The lifespan of the routes: connects at its start, gives the lease back at its end."""
        freeze()
        keep_large_buffers_apart()
        self._connecting = asyncio.create_task(self._connect())
        yield
        if self._connecting.done() and not self._failure():
            await self._connecting.result().close()
        self._connecting.cancel()

    def _failure(self) -> BaseException | None:
        return self._connecting.exception() if self._connecting and self._connecting.done() else None

    async def _connect(self) -> Pool:
        try:
            pool = await Pool.connect(self._settings)
        except UserError as error:
            self._failed_s = time.monotonic()
            logger.error("no pool, and so no sessions: %s", error)
            raise
        logger.info("ready: open %s", page_address())
        return pool


@serve.ingress()
class Replica:
    """One ingress replica: holds its lease on the pool, and serves the routes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this in every replica, after the constructor."""
        link = PoolLink(pool_settings(self._settings))
        return build_api(Backend(link.get, link.not_ready_because, link.held), self._settings)


# An ingress only moves and packs frames; whole CPUs for it would leave none for the members on a small machine.
INGRESS = serve.deployment(name="Ingress", ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=10)(Replica)


def app(settings: Settings) -> serve.Application:
    """Builds the application; Serve passes what was given on the command line or in the YAML."""
    num_requests = settings.max_sessions + OTHER_REQUESTS
    return INGRESS.options(num_replicas=settings.num_replicas, max_ongoing_requests=num_requests).bind(settings)


def pool_settings(settings: Settings) -> PoolSettings:
    """The part of the settings that decides which pool is shared."""
    return PoolSettings(
        weights=settings.weights_path,
        num_threads=settings.num_threads,
        max_batch=settings.max_batch,
        lease_s=settings.lease_s,
        device=settings.device,
    )


def page_address() -> str:
    """Where the page is, as seen from this machine."""
    client = _get_global_client()
    assert client is not None, "only a replica knows where its proxy listens"
    options = client.http_config
    host = "127.0.0.1" if options.host in (None, "0.0.0.0", "::") else options.host
    return f"http://{host}:{options.port}{options.root_path}/"
