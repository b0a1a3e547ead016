"""`serving:app`: the Serve application. One deployment, whose replicas are the ingress and share one pool of members.

Called by `serve run serving:app key=value`, by Serve's YAML (`import_path: serving:app`, settings under `args`), and in
every replica. No `from __future__ import annotations` here: Serve reads the builder's annotation to build the settings.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client

from cluster.errors import PoolFailed
from cluster.memory import freeze, keep_large_buffers_apart
from cluster.metrics import on_ray
from cluster.session import Pool
from cluster.settings import PoolSettings
from serving.draining import until_draining
from serving.metrics import IngressMetrics
from serving.replica import Replica
from serving.routes import Backend, build_api
from serving.settings import Settings
from stages.errors import UserError

logger = logging.getLogger("ray.serve")

RETRY_S = 30.0
"""A pool that cannot be had is asked for again so often."""
OTHER_REQUESTS = 64
"""Places beside the sessions: pages, health checks, and sockets that are told that all is taken."""


class PoolLink:
    """A replica's way to the pool: connects in the background, and after a failure again every `RETRY_S`."""

    def __init__(self, settings: PoolSettings, replica: Replica):
        self._settings, self._replica = settings, replica
        self._connected: asyncio.Future[Pool]
        """Of the newest attempt that has come to its end; of the first one while there is none."""

    async def get(self) -> Pool:
        """The pool, once it is loaded. Raises UserError with the reason why the last attempt failed."""
        return await asyncio.shield(self._connected)

    async def house(self) -> Mapping[str, Any]:
        """What the pool's manager knows. Raises UserError while there is no pool."""
        if not self._connected.done():
            raise PoolFailed("the weights are being loaded")
        return await (await self.get()).status()

    def not_ready_because(self) -> str | None:
        """Why no session can be opened, as a sentence; None when one can."""
        if not self._connected.done():
            return "the weights are being loaded"
        failure = self._connected.exception() or self._connected.result().failed
        return None if failure is None else str(failure)

    @asynccontextmanager
    async def held(self, api: FastAPI) -> AsyncIterator[None]:
        """The lifespan of the routes: connects at its start, gives the lease back at its end."""
        freeze()
        keep_large_buffers_apart()
        self._connected = asyncio.get_running_loop().create_future()
        tasks = [asyncio.create_task(self._connect()), asyncio.create_task(self._move_out())]
        yield
        for task in tasks:
            task.cancel()
        if self._connected.done() and not self._connected.exception():
            await self._connected.result().close()

    async def _connect(self) -> None:
        """Until it succeeds: nobody may ask for a replica that is not ready, so it does not wait to be asked."""
        while True:
            try:
                pool = await Pool.connect(self._settings)
                break
            except Exception as error:
                logger.error("no pool, and so no sessions: %s", error, exc_info=not isinstance(error, UserError))
                failed = self._settle()
                failed.set_exception(error)
                failed.exception()  # Read once, so that it is not logged again as one that nobody has seen.
                await asyncio.sleep(RETRY_S)
        pool.describe = self._replica.describe
        self._settle().set_result(pool)
        logger.info("ready: open %s", page_address())

    async def _move_out(self) -> None:
        """When this replica is being replaced: its clients go to others, while it still serves them."""
        await until_draining()
        await self._replica.announce_draining()

    def _settle(self) -> asyncio.Future[Pool]:
        """The future to put a result into: the one that is being waited for, or a new one behind a failure."""
        if self._connected.done():
            self._connected = asyncio.get_running_loop().create_future()
        return self._connected


@serve.ingress()
class Ingress:
    """One ingress replica: holds its lease on the pool, and serves the routes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this in every replica, after the constructor."""
        replica = Replica(serve.get_replica_context().replica_id.unique_id, on_ray(IngressMetrics))
        link = PoolLink(pool_settings(self._settings), replica)
        backend = Backend(link.get, link.not_ready_because, link.held, link.house)
        return build_api(backend, self._settings, replica)


INGRESS = serve.deployment(
    name="Ingress",
    ray_actor_options={
        # An ingress only moves and packs frames; whole CPUs would leave none for the members on a small machine.
        "num_cpus": 0.1,
        # By default Ray waits a second for the cause of a member's death before it reports it. The cause is not asked.
        "runtime_env": {"env_vars": {"RAY_timeout_ms_task_wait_for_death_info": "50"}},
    },
    # New replicas come before old ones go, and these have time to send their clients to them.
    max_surge_percent=100,
    graceful_shutdown_timeout_s=20,
    health_check_period_s=2,
)(Ingress)


def app(settings: Settings) -> serve.Application:
    """Builds the application; Serve passes what was given on the command line or in the YAML."""
    settings = settings.with_absolute_weights()
    num_requests = settings.max_sessions + OTHER_REQUESTS
    return INGRESS.options(num_replicas=settings.num_replicas, max_ongoing_requests=num_requests).bind(settings)


def pool_settings(settings: Settings) -> PoolSettings:
    """The part of the settings that decides which pool is shared."""
    return PoolSettings(
        weights=settings.weights,
        num_threads=settings.num_threads,
        max_batch=settings.max_batch,
        target_fps=settings.target_fps,
        max_queue=settings.max_queue,
        spare_members=settings.spare_members,
        hang_s=settings.hang_s,
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
