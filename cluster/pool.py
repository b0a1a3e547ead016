"""The pool manager: the actor that makes a pool's members, keeps them while they are needed, and seats sessions.

Created by `cluster.session` under the pool's name. No chunk passes through it: it is asked when a session opens or
closes, and by every ingress replica that renews its lease. All it knows can be had again from its constructor's
arguments and from its members, so that Ray may restart it at any time; members and sessions do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import MemberLost, PoolFailed, StageFailed
from cluster.member import Member
from cluster.messages import Route
from cluster.placement import MemberPlan, Plan
from cluster.settings import STAGES, PoolSettings
from cluster.unwrap import to_user_error
from stages.config import ModelConfig

NAMESPACE = "personalive"
"""Ray's namespace for the names of managers and members."""
MAX_FAILED_LOADS = 5
"""In a row, of one member; then the pool gives up."""
POLL_S = 1.0
"""How often members are asked whether they live."""
ANSWER_S = 10.0
"""How long a member may take to say which sessions it holds."""
PLACEMENT_S = 60.0
"""How long the cluster may take to find room for the members."""
FAREWELL_S = 3.0
"""How long a failed manager stays to tell the reason to whoever asks."""


@dataclass
class Watched:
    """A member and what the manager last heard of it."""

    plan: MemberPlan
    handle: Any
    up: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Seat:
    """Where a session lives: member names by stage."""

    lease: str
    members: dict[str, str]
    epoch: int = 0


class PoolManager:
    """See the module. `plan` comes from whoever created the manager first, and stays the same over its restarts."""

    def __init__(self, name: str, settings: PoolSettings, plan: Plan):
        self.name, self.settings, self.plan = name, settings, plan
        self.members: dict[str, Watched] = {}
        self.leases: dict[str, float] = {}
        self.seats: dict[str, Seat] = {}
        self.config: ModelConfig | None = None
        self.failure: PoolFailed | None = None
        self.settled = asyncio.Event()
        self.used_s = time.monotonic()
        self.life = asyncio.create_task(self._live())

    async def join(self, lease: str) -> ModelConfig:
        """Takes a lease and waits until all members are loaded. Raises PoolFailed."""
        await self.renew(lease)
        await self._settle()
        assert self.config is not None
        return self.config

    async def renew(self, lease: str) -> bool:
        """Keeps a lease for `lease_s` more; one that this manager does not know is taken up.

        Returns whether the members have been loaded. Raises PoolFailed when the pool has given up.
        """
        self.used_s = self.leases[lease] = time.monotonic()
        if self.failure:
            raise self.failure
        return self.settled.is_set()

    async def leave(self, lease: str) -> None:
        """Gives a lease back, and closes its sessions."""
        self.used_s = time.monotonic()
        self._drop(lease)

    async def open(self, session: str, lease: str) -> Route:
        """Seats a session on the least loaded members, once these answer. A seated one gets a new seat and epoch.

        Whoever opens has a lease, even where this manager is younger than its last renewal.
        """
        await self.renew(lease)
        await self._settle()
        previous = self.seats.pop(session, None)
        members = {stage: self._least_loaded(stage) for stage in STAGES}
        epoch = previous.epoch + 1 if previous else 0
        self.seats[session] = Seat(lease, {stage: member.plan.name for stage, member in members.items()}, epoch)
        for member in members.values():
            await self._answer(member)
        return Route(epoch=epoch, **{stage: member.handle for stage, member in members.items()})

    async def close(self, session: str) -> None:
        """Forgets a session here and on the denoise members: all of them, in case its seat was lost in a restart."""
        self.seats.pop(session, None)
        for member in self._hosts("denoise"):
            member.handle.close_session.remote(session)

    async def _live(self) -> None:
        """From the first member to the last: everything is removed when this ends, for whatever reason."""
        try:
            self._start_members(await self._group())
            tasks = [asyncio.create_task(self._watch(member)) for member in self.members.values()]
            tasks += [asyncio.create_task(self._adopt()), asyncio.create_task(self._keep_leases())]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        except _Unused:
            self.failure = PoolFailed("the pool was not used any more and is being removed; connect again")
        except Exception as error:
            self.failure = error if isinstance(error, PoolFailed) else PoolFailed(f"the pool's manager failed: {error}")
        self.settled.set()
        self._remove_members()
        if self.leases:
            await asyncio.sleep(FAREWELL_S)
        ray.kill(ray.get_runtime_context().current_actor)

    async def _group(self) -> PlacementGroup:
        """The placement group: that of an earlier life of this manager, or a new one."""
        try:
            group = get_placement_group(self.name)
        except ValueError:
            group = placement_group(self.plan.bundles, self.plan.strategy, name=self.name, lifetime="detached")
        if not await asyncio.to_thread(group.wait, PLACEMENT_S):
            needed = ", ".join(map(str, self.plan.bundles))
            raise PoolFailed(
                f"no room for the members ({needed}) within {PLACEMENT_S:.0f} s: something else holds the cluster's "
                "CPUs or GPUs; stop it or add a machine"
            )
        return group

    def _start_members(self, group: PlacementGroup) -> None:
        """Creates every member, or takes over the one of that name. The reference member first: denoise needs it."""
        for plan in sorted(self.plan.members, key=lambda plan: "reference" not in plan.stages):
            reference = None if "reference" in plan.stages else self._hosts("reference")[0].handle
            actor = ray.remote(Member).options(
                name=f"{self.name}:{plan.name}",
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=0,
                num_cpus=plan.num_cpus,
                num_gpus=plan.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, plan.bundle),
            )
            self.members[plan.name] = Watched(plan, actor.remote(plan, self.settings, reference))

    async def _watch(self, member: Watched) -> None:
        """Asks one member for ever. Ends with PoolFailed when its weights do not load."""
        num_failed = 0
        while True:
            life = None
            try:
                life = await member.handle.hello.remote()
                self.config = await member.handle.ready.remote()
                member.up.set()
                num_failed = 0
            except Exception as error:
                member.up.clear()
                num_failed += life is not None or isinstance(error, ActorDiedError)
                give_up(member.plan.name, to_user_error(error), num_failed)
            await asyncio.sleep(POLL_S)

    async def _adopt(self) -> None:
        """When all members are up: the sessions that they already hold, from before a restart of this manager."""
        for member in self.members.values():
            await member.up.wait()
        for member in self._hosts("denoise"):
            for record in await member.handle.sessions.remote():
                self.leases.setdefault(record.lease, time.monotonic())
                self.seats.setdefault(record.session, Seat(record.lease, {"denoise": member.plan.name}, record.epoch))
        self.settled.set()

    async def _keep_leases(self) -> None:
        """Drops leases that were not renewed, and what members still hold for such; ends with _Unused when there has
        been none for `lease_s`."""
        while True:
            oldest_s = time.monotonic() - self.settings.lease_s
            for lease in [lease for lease, renewed_s in self.leases.items() if renewed_s < oldest_s]:
                self._drop(lease)
            if self.used_s < oldest_s:
                raise _Unused
            if self.settled.is_set():
                await self._close_leaseless()
            await asyncio.sleep(min(POLL_S, self.settings.lease_s / 4))

    async def _close_leaseless(self) -> None:
        """Closes sessions that were still being opened when their lease lapsed."""
        for member in self._hosts("denoise"):
            if member.up.is_set():
                with contextlib.suppress(RayError, TimeoutError):
                    async with asyncio.timeout(ANSWER_S):
                        records = await member.handle.sessions.remote()
                    for record in records:
                        if record.lease not in self.leases:
                            member.handle.close_session.remote(record.session)

    async def _settle(self) -> None:
        await self.settled.wait()
        if self.failure:
            raise self.failure

    async def _answer(self, member: Watched) -> None:
        """Waits until a member answers: it may have died since it was last asked."""
        while True:
            await self._settle()
            try:
                await member.handle.ready.remote()
                return
            except RayError:
                await asyncio.sleep(POLL_S / 4)

    def _hosts(self, stage: str) -> list[Watched]:
        return [member for member in self.members.values() if stage in member.plan.stages]

    def _least_loaded(self, stage: str) -> Watched:
        taken = [seat.members.get(stage) for seat in self.seats.values()]
        return min(self._hosts(stage), key=lambda member: taken.count(member.plan.name))

    def _drop(self, lease: str) -> None:
        self.leases.pop(lease, None)
        for session in [session for session, seat in self.seats.items() if seat.lease == lease]:
            seat = self.seats.pop(session)
            self.members[seat.members["denoise"]].handle.close_session.remote(session)

    def _remove_members(self) -> None:
        for member in self.members.values():
            ray.kill(member.handle)
        try:
            remove_placement_group(get_placement_group(self.name))
        except ValueError:
            return


class _Unused(Exception):
    """Nobody holds a lease any more."""


def give_up(name: str, error: Exception, num_failed: int) -> None:
    """Raises PoolFailed: at once for a typed error, which loading again cannot mend; else after too many failures."""
    if not isinstance(error, MemberLost | StageFailed):
        raise PoolFailed(str(error))
    if num_failed >= MAX_FAILED_LOADS:
        raise PoolFailed(f"member {name} failed {num_failed} times in a row while loading its weights; last: {error}")
