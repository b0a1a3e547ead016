"""Ray itself is the other side here: that its private names still mean the same, and what is done when they do not."""

import asyncio

import pytest
from ray._private.worker import global_worker
from ray.serve._private.replica import Replica, ReplicaActor

from serving import draining


class Actor:
    """As Ray keeps a replica's actor."""

    def __init__(self, impl):
        self._replica_impl = impl


class Impl:
    _shutting_down = False


@pytest.fixture
def impl(monkeypatch):
    """This process as a replica."""
    impl = Impl()
    monkeypatch.setattr(global_worker, "actors", {"another": object(), "replica": Actor(impl)})
    return impl


@pytest.fixture(autouse=True)
def nothing_said_yet():
    draining._warn_once.cache_clear()


def test_the_installed_ray_keeps_the_flag_where_it_is_looked_for():
    assert global_worker.actors == {}
    assert "_replica_impl" in ReplicaActor.__init__.__code__.co_names
    assert "_shutting_down" in Replica.__init__.__code__.co_names
    assert "_shutting_down" in Replica._perform_graceful_shutdown.__code__.co_names


def test_a_replica_drains_from_when_serve_says_so(impl):
    assert not draining.is_draining()
    impl._shutting_down = True
    assert draining.is_draining()


async def test_waiting_ends_when_the_drain_begins(impl):
    waiting = asyncio.create_task(draining.until_draining(poll_s=0.01))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    impl._shutting_down = True
    await asyncio.wait_for(waiting, 1)


def test_outside_of_a_replica_nothing_drains_and_that_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(draining.logger, "filters", [lambda record: said.append(record)])
    assert not draining.is_draining()
    assert not draining.is_draining()
    assert len(said) == 1


def test_a_ray_without_the_flag_drains_nobody(impl, monkeypatch):
    monkeypatch.delattr(Impl, "_shutting_down")
    assert not draining.is_draining()
