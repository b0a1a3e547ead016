"""From the cluster's resources to the members of a pool: a pure function. Called by `cluster.session` at connect.

Why it looks like this (work of one chunk at full size: denoise 69 %, decode 29 %, motion with reference below 4 %):

- Ray's CPU and GPU numbers are bookkeeping and limit nobody; what a member really uses is its torch threads, which are
  set explicitly. So members claim little, and leave room for what else must run beside them: on two CPUs a whole CPU
  for Ray Data's tasks and a quarter for an ingress replica.
- Without a GPU three processes (motion with reference, denoise, decode) overlap on the machine's cores.
- Processes that share one GPU take turns on it rather than overlap. So on one GPU there is a single member, in which
  every stage has a thread of its own.
- With several GPUs each member owns one. The next GPU always goes where most work waits per member: denoise, decode,
  then motion with reference, whose own GPU takes little load but takes it off the path of the others; from then on
  further denoise and decode members in the ratio of their work. With two GPUs motion and reference live with decode.
- A spare member hosts all stages, loaded and idle, until one of the others dies: one of them stands in for any. It has
  a small share of a GPU that a member works on: memory for the weights is what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.errors import PoolFailed
from cluster.settings import STAGES, PoolSettings

CPU_SHARE = 1 / 8
"""Share of a machine's CPUs that one member claims where there is no GPU: three leave five eighths."""
MAX_CPUS = 1.0
"""No member claims more: its work is on the GPU, or on threads that Ray does not count."""
SPARE_CPUS = 0.01
SPARE_GPUS = 0.1
WORK = {"denoise": 0.69, "decode": 0.29}
"""Share of a chunk's work, for the GPUs after the third."""


@dataclass(frozen=True)
class Node:
    """What one machine offers to Ray."""

    num_cpus: float
    num_gpus: int = 0


@dataclass(frozen=True)
class MemberPlan:
    """One member: an actor, its place, and the stages it hosts."""

    name: str
    stages: tuple[str, ...]
    bundle: int
    """Index into the placement group."""
    num_cpus: float
    num_gpus: float
    num_threads: int
    """Torch threads; 0: default of the machine it lands on."""
    is_spare: bool = False


@dataclass(frozen=True)
class Plan:
    """The pool: one bundle per member, in the order of the members."""

    members: tuple[MemberPlan, ...]
    strategy: str = "PACK"
    """Close together, since chunks travel between all of them; over several machines where one does not suffice."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """As Ray's placement groups want them."""
        return [
            {"CPU": member.num_cpus} | ({"GPU": member.num_gpus} if member.num_gpus else {}) for member in self.members
        ]


def plan_pool(nodes: Sequence[Node], settings: PoolSettings) -> Plan:
    """The members for these machines. Raises PoolFailed when a pool cannot fit, naming what is missing."""
    num_gpus = 0 if settings.device == "cpu" else sum(node.num_gpus for node in nodes)
    if settings.device == "cuda" and num_gpus == 0:
        raise PoolFailed("device is cuda, but no machine of the cluster offers a GPU; set device=cpu or add one")
    groups = _groups_on_gpus(num_gpus) if num_gpus else _groups_on_cpus()
    num_cpus = _cpus_per_member([node for node in nodes if node.num_gpus or not num_gpus], bool(num_gpus))
    members = _members(groups, num_cpus, 1.0 if num_gpus else 0.0, settings.num_threads)
    return Plan(_with_spares(members, settings.spare_members, num_gpus))


def _with_spares(members: tuple[MemberPlan, ...], num_spares: int, num_gpus: int) -> tuple[MemberPlan, ...]:
    if not num_spares:
        return members
    spare_gpus = SPARE_GPUS if num_gpus else 0.0
    num_on_one_gpu = -(-num_spares // num_gpus) if num_gpus else 0
    left = round(1 - SPARE_GPUS * num_on_one_gpu, 3)
    if num_gpus and left < 0.5:
        raise PoolFailed(f"{num_spares} spare members are too many for {num_gpus} GPUs: at most 5 share one")
    workers = [replace(member, num_gpus=left) if num_gpus else member for member in members]
    spares = [
        MemberPlan(f"spare-{n}", STAGES, len(members) + n, SPARE_CPUS, spare_gpus, members[0].num_threads, True)
        for n in range(num_spares)
    ]
    return (*workers, *spares)


def _groups_on_cpus() -> list[tuple[str, ...]]:
    return [("motion", "reference"), ("denoise",), ("decode",)]


def _groups_on_gpus(num_gpus: int) -> list[tuple[str, ...]]:
    if num_gpus == 1:
        return [STAGES]
    if num_gpus == 2:
        return [("denoise",), ("motion", "reference", "decode")]
    groups: list[tuple[str, ...]] = [("denoise",), ("decode",), ("motion", "reference")]
    while len(groups) < num_gpus:
        groups.append((max(WORK, key=lambda stage: WORK[stage] / groups.count((stage,))),))
    return groups


def _cpus_per_member(nodes: Sequence[Node], on_gpu: bool) -> float:
    """What every machine that takes part can give to each member, rounded to what Ray can count."""
    shares = [node.num_cpus / (2 * node.num_gpus) if on_gpu else node.num_cpus * CPU_SHARE for node in nodes]
    share = (min if on_gpu else max)(shares, default=0.0)
    if share < 0.1:
        raise PoolFailed("no machine of the cluster has CPUs enough for a pool; start Ray with num_cpus of 1 or more")
    return round(min(share, MAX_CPUS), 3)


def _members(
    groups: Sequence[tuple[str, ...]], num_cpus: float, num_gpus: float, num_threads: int
) -> tuple[MemberPlan, ...]:
    members: list[MemberPlan] = []
    for bundle, stages in enumerate(groups):
        number = sum(member.stages == stages for member in members)
        plan = MemberPlan("", stages, bundle, num_cpus, num_gpus, num_threads)
        members.append(replace(plan, name=f"{'+'.join(stages)}-{number}"))
    return tuple(members)
