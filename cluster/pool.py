"""The pool manager: the actor that makes a pool's members, keeps them while they are needed, and seats sessions.

Created by `cluster.session` under the pool's name. No chunk passes through it: it is asked when a session opens, rests,
moves or closes, and by every ingress replica that renews its lease. All it knows can be had again from its
constructor's arguments, from its members and from its replicas, so that Ray may restart it at any time; members and
sessions do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.admission import Line, num_places
from cluster.engine import MAX_SESSIONS
from cluster.errors import MemberLost, PoolBusy, PoolFailed, SessionMoved, StageFailed
from cluster.member import Member
from cluster.messages import MemberReport, Route, SeatRequest, Waiting
from cluster.metrics import ManagerMetrics, on_ray
from cluster.placement import Plan
from cluster.settings import STAGES, PoolSettings
from cluster.status import (
    Seat,
    Watched,
    all_counts,
    is_stuck,
    manager_status,
    member_status,
    replica_status,
    session_statuses,
)
from cluster.unwrap import to_user_error
from cluster.warmup import warm_up
from stages.config import ModelConfig

NAMESPACE = "personalive"
"""Ray's namespace for the names of managers and members."""
MAX_FAILED_LOADS = 5
"""In a row, of one member; then the pool gives up."""
POLL_S = 1.0
"""How often members are asked how they are."""
PLACEMENT_S = 60.0
"""How long the cluster may take to find room for the members."""
FAREWELL_S = 3.0
"""How long a failed manager stays to tell the reason to whoever asks."""
SILENT_S = 10.0
"""A replica that has not renewed its lease for so long is not shown any more."""
DYING_S = 0.5
"""A killed process may still answer what it was asked so shortly after its death was noticed."""

logger = logging.getLogger(__name__)


class PoolManager:
    """See the module. `plan` comes from whoever created the manager first, and stays the same over its restarts."""

    def __init__(self, name: str, settings: PoolSettings, plan: Plan):
        self.name, self.settings, self.plan = name, settings, plan
        self.members: dict[str, Watched] = {}
        self.leases: dict[str, float] = {}
        self.replicas: dict[str, Mapping[str, Any]] = {}
        """By lease: what the replica last said of itself."""
        self.seats: dict[str, Seat] = {}
        self.line = Line()
        self.metrics = on_ray(ManagerMetrics)
        self.counts: Counter[str] = Counter()
        self.config: ModelConfig | None = None
        self.failure: PoolFailed | None = None
        self.settled = asyncio.Event()
        self.started_s = self.used_s = time.monotonic()
        self.life = asyncio.create_task(self._live())

    async def join(self, lease: str) -> ModelConfig:
        """Takes a lease and waits until all members are loaded. Raises PoolFailed."""
        await self.renew(lease)
        await self._settle()
        assert self.config is not None
        return self.config

    async def renew(self, lease: str, replica: Mapping[str, Any] | None = None) -> bool:
        """Keeps a lease for `lease_s` more; one that this manager does not know is taken up. `replica`: for `status`.

        Returns whether the members have been loaded. Raises PoolFailed when the pool has given up.
        """
        self.used_s = self.leases[lease] = time.monotonic()
        if replica is not None:
            self.replicas[lease] = replica
        if self.failure:
            raise self.failure
        return self.settled.is_set()

    async def leave(self, lease: str) -> None:
        """A replica stops. Its sessions stay until its lease lapses: their clients may come back to another one."""
        self.used_s = time.monotonic()
        self.replicas.pop(lease, None)
        if not any(seat.lease == lease for seat in self.seats.values()):
            self.leases.pop(lease, None)

    async def open(self, request: SeatRequest) -> Route | Waiting:
        """A place for a session, or its place in the line.

        A session that has a seat keeps its place: it gets a new epoch, and other members for those that were lost.
        Raises PoolBusy when the line is full, SessionMoved when the seat belongs to a later epoch, PoolFailed.
        """
        await self.renew(request.lease)
        await self._settle()
        seat = self.seats.get(request.session)
        has_place = seat is not None and not seat.is_idle
        if request.epoch is None and not has_place and (waiting := self._wait_in_line(request)):
            return waiting
        if seat is not None and request.epoch is not None and seat.epoch > request.epoch:
            raise SessionMoved("the session goes on on another connection")
        self._lose(request.lost)
        members = {stage: await self._host(stage, seat) for stage in STAGES}
        # Another question may have been answered meanwhile.
        seat = self.seats.get(request.session)
        epoch = max(seat.epoch if seat else -1, request.epoch if request.epoch is not None else -1) + 1
        names = {stage: member.plan.name for stage, member in members.items()}
        came_s = seat.came_s if seat else time.time()
        self.seats[request.session] = Seat(request.lease, names, epoch, came_s)
        self.counts["recovered" if request.epoch is not None else "resumed" if seat else "admitted"] += 1
        return Route(
            **{stage: member.handle for stage, member in members.items()},
            epoch=epoch,
            names=names,
            lives={stage: member.life for stage, member in members.items() if member.life},
            previous=self.members[seat.members["denoise"]].handle if seat else None,
        )

    async def rest(self, session: str, epoch: int) -> None:
        """The session has nothing to do for a while: somebody else may have its place."""
        seat = self.seats.get(session)
        if seat is not None and seat.epoch == epoch:
            self.seats[session] = replace(seat, is_idle=True)

    async def wake(self, request: SeatRequest) -> Waiting | None:
        """The session wants a place again. None when it has one, or was never without."""
        await self.renew(request.lease)
        seat = self.seats.get(request.session)
        if seat is None or not seat.is_idle:
            return None
        waiting = self._wait_in_line(request)
        if waiting is None:
            self.seats[request.session] = replace(seat, is_idle=False)
        return waiting

    async def epoch(self, session: str) -> int | None:
        """Of the session's present life; None: it has no seat, and cannot go on."""
        await self._settle()
        seat = self.seats.get(session)
        return None if seat is None else seat.epoch

    async def close(self, session: str, last_epoch: int | None = None) -> None:
        """Forgets a session here and on the denoise members: all of them, in case its seat was lost in a restart.

        One that has gone on in a later life than `last_epoch` stays.
        """
        self.line = self.line.without(session)
        seat = self.seats.get(session)
        if seat is not None and (last_epoch is None or seat.epoch <= last_epoch):
            del self.seats[session]
            self.line = self.line.stayed(max(time.time() - seat.came_s, 0.0))
        for member in self._hosts("denoise"):
            member.handle.close_session.remote(session, last_epoch)

    async def status(self) -> dict[str, Any]:
        """The house as it is, for people: see docs/observability.md."""
        is_ready = self.settled.is_set() and self.failure is None
        lately_s = time.monotonic() - SILENT_S
        replicas = [told for lease, told in self.replicas.items() if self.leases.get(lease, 0.0) > lately_s]
        return {
            "ready": is_ready,
            "reason": None if self.failure is None else str(self.failure),
            "target_fps": self.settings.target_fps,
            "places": self.places if is_ready else 0,
            "num_sessions": self.num_active,
            "num_idle": len(self.seats) - self.num_active,
            "num_queued": len(self.line.since_s),
            "members": [member_status(member, self.seats.values()) for member in self.members.values()],
            "manager": manager_status(time.monotonic() - self.started_s),
            "replicas": [replica_status(replica) for replica in replicas],
            "sessions": session_statuses(replicas, self.seats),
            "counts": all_counts(self.counts, replicas),
        }

    @property
    def num_active(self) -> int:
        """Sessions that have a place."""
        return sum(not seat.is_idle for seat in self.seats.values())

    @property
    def places(self) -> int:
        """How many sessions can be served at the target rate."""
        assert self.config is not None
        reports = [member.report.call_ms for member in self._workers() if member.report]
        chunk_frames, settings = self.config.window.chunk_frames, self.settings
        return num_places(reports, settings.target_fps, chunk_frames, settings.max_batch, MAX_SESSIONS)

    def _wait_in_line(self, request: SeatRequest) -> Waiting | None:
        """None where it has its turn and there is a place. Who had one before comes first. Raises PoolBusy."""
        seat = self.seats.get(request.session)
        since_s = request.since_s if seat is None else seat.came_s
        line = self.line.ask(request.session, since_s, time.monotonic())
        places, waiting = self.places, line.waiting(request.session, self.places)
        if waiting.position <= places - self.num_active:
            self.line = line.without(request.session)
            return None
        if waiting.position > self.settings.max_queue:
            self.counts["refused"] += 1
            told = f"all {places} places are taken and {self.settings.max_queue} people wait already"
            raise PoolBusy(f"{told}: try again in {waiting.estimate_s:.0f} s", retry_s=waiting.estimate_s)
        self.counts["queued"] += request.session not in self.line.since_s
        self.line = line
        return waiting

    async def _host(self, stage: str, seat: Seat | None) -> Watched:
        """Who works for a session at this stage: who did so before, else the least loaded that lives, a spare last."""
        while True:
            await self._settle()
            hosts = [member for member in self._hosts(stage) if member.up.is_set()]
            if seat and (before := [member for member in hosts if member.plan.name == seat.members.get(stage)]):
                return before[0]
            if hosts:
                taken = Counter(seat.members.get(stage) for seat in self.seats.values())
                return min(hosts, key=lambda member: (member.plan.is_spare, taken[member.plan.name]))
            await asyncio.sleep(POLL_S / 10)

    def _lose(self, actor_id: str | None) -> None:
        """A replica has found a member dead, before we have."""
        for member in self.members.values():
            if member.handle._actor_id.hex() == actor_id:
                member.up.clear()
                member.lost_s = time.monotonic()

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
        """Creates every member, or takes over the one of that name."""
        for plan in self.plan.members:
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
            self.members[plan.name] = Watched(plan, actor.remote(plan, self.settings))

    async def _watch(self, member: Watched) -> None:
        """Asks one member for ever. Ends with PoolFailed when its weights do not load."""
        num_failed = 0
        while True:
            asked_s, life = time.monotonic(), None
            try:
                if not member.up.is_set():
                    life = await member.handle.hello.remote()
                    self.config = await member.handle.ready.remote()
                async with asyncio.timeout(self.settings.hang_s):
                    report = await member.handle.report.remote()
                if asked_s > member.lost_s + DYING_S:
                    self._hear(member, report)
                    num_failed = 0
                if is_stuck(report, self.settings.hang_s):
                    raise TimeoutError
            except TimeoutError:
                logger.error("member %s does not answer, and is replaced", member.plan.name)
                member.up.clear()
                member.has_hung = True
                await self._kill(member)
            except Exception as error:
                member.up.clear()
                num_failed += life is not None or isinstance(error, ActorDiedError)
                give_up(member.plan.name, to_user_error(error), num_failed)
            # One that is being waited for is wanted at once.
            await asyncio.sleep(POLL_S if member.up.is_set() else POLL_S / 10)

    def _hear(self, member: Watched, report: MemberReport) -> None:
        before, now_s = member.report, time.monotonic()
        if before is not None and before.life.id == report.life.id:
            busy_s = max(report.busy_s[stage] - before.busy_s[stage] for stage in report.busy_s)
            member.busy = round(min(busy_s / max(now_s - member.heard_s, POLL_S / 10), 1.0), 2)
        if before is not None and before.life.id != report.life.id:
            member.num_restarts += 1
            self.metrics.member_restarts_total(1, "hung" if member.has_hung else "died")
            member.has_hung = False
            # What calls take is a fact of the machine, not of one process.
            call_ms = {stage: report.call_ms[stage] or before.call_ms[stage] for stage in report.call_ms}
            report = replace(report, call_ms=call_ms)
        member.report, member.life, member.heard_s = report, report.life, now_s
        member.up.set()

    async def _kill(self, member: Watched) -> None:
        """Ends the process of a member that cannot be asked to: Ray then starts another one."""
        if member.life is None:
            return
        node = NodeAffinitySchedulingStrategy(member.life.node, soft=False)
        task = ray.remote(_kill_process).options(num_cpus=0, scheduling_strategy=node)
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(self.settings.hang_s):
                await task.remote(member.life.pid)

    async def _adopt(self) -> None:
        """When all members are up: the sessions that they already hold, from before a restart of this manager."""
        for member in self.members.values():
            await member.up.wait()
        for member in self._hosts("denoise"):
            for record in member.report.sessions if member.report else ():
                self.leases.setdefault(record.lease, time.monotonic())
                self.seats.setdefault(record.session, Seat(record.lease, record.members, record.epoch, time.time()))
        assert self.config is not None
        if not self.seats:
            await self._warm_up()
        for member in self._workers():
            self._hear(member, await member.handle.report.remote())
        self.settled.set()

    async def _warm_up(self) -> None:
        """All members do some work before the first person comes; one that dies at it will do so later."""
        assert self.config is not None
        spares = [member for member in self.members.values() if member.plan.is_spare]
        teams = [{stage: self._workers(stage)[0].handle for stage in STAGES}]
        teams += [dict.fromkeys(STAGES, spare.handle) for spare in spares]
        for team in teams:
            with contextlib.suppress(RayActorError):
                await warm_up(self.config, team)

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
                self._close_leaseless()
                self.metrics.places(self.places)
            await asyncio.sleep(min(POLL_S, self.settings.lease_s / 4))

    def _close_leaseless(self) -> None:
        """Closes sessions that were still being opened when their lease lapsed."""
        for member in self._hosts("denoise"):
            for record in member.report.sessions if member.report and member.up.is_set() else ():
                if record.lease not in self.leases:
                    member.handle.close_session.remote(record.session)

    async def _settle(self) -> None:
        await self.settled.wait()
        if self.failure:
            raise self.failure

    def _hosts(self, stage: str) -> list[Watched]:
        return [member for member in self.members.values() if stage in member.plan.stages]

    def _workers(self, stage: str | None = None) -> list[Watched]:
        """The members that are no spares, of one stage or all."""
        members = self.members.values() if stage is None else self._hosts(stage)
        return [member for member in members if not member.plan.is_spare]

    def _drop(self, lease: str) -> None:
        self.leases.pop(lease, None)
        self.replicas.pop(lease, None)
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


def _kill_process(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
