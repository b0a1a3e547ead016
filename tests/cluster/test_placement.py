import pytest

from cluster.errors import PoolFailed
from cluster.placement import Node, plan_pool
from cluster.settings import STAGES, PoolSettings

CPU = PoolSettings(device="cpu")
AUTO = PoolSettings(num_threads=3)


def hosted(nodes: list[Node], settings: PoolSettings = AUTO) -> list[tuple[str, ...]]:
    return [member.stages for member in plan_pool(nodes, settings).members]


def test_two_cpus_get_three_members_and_leave_room_for_a_data_task_and_an_ingress() -> None:
    plan = plan_pool([Node(num_cpus=2)], AUTO)
    assert [member.stages for member in plan.members] == [("motion", "reference"), ("denoise",), ("decode",)]
    assert sum(bundle["CPU"] for bundle in plan.bundles) <= 2 - 1 - 0.25
    assert all("GPU" not in bundle for bundle in plan.bundles)


def test_one_gpu_hosts_all_stages_in_one_member() -> None:
    plan = plan_pool([Node(num_cpus=8, num_gpus=1)], AUTO)
    assert [member.stages for member in plan.members] == [STAGES]
    assert plan.bundles == [{"CPU": 1.0, "GPU": 1.0}]


def test_two_gpus_part_denoise_from_the_rest() -> None:
    assert hosted([Node(8, 1), Node(8, 1)]) == [("denoise",), ("motion", "reference", "decode")]


def test_three_gpus_give_motion_and_reference_their_own() -> None:
    assert hosted([Node(8, 3)]) == [("denoise",), ("decode",), ("motion", "reference")]


def test_further_gpus_go_where_most_work_waits() -> None:
    groups = hosted([Node(64, 8)])
    assert groups[3:5] == [("denoise",), ("denoise",)]
    assert (groups.count(("denoise",)), groups.count(("decode",)), groups.count(("motion", "reference"))) == (5, 2, 1)


@pytest.mark.parametrize("nodes", [[Node(1)], [Node(2)], [Node(32)], [Node(4, 1), Node(2)], [Node(16, 8)]])
def test_every_stage_has_a_host_and_every_member_its_own_name_and_bundle(nodes: list[Node]) -> None:
    plan = plan_pool(nodes, AUTO)
    assert {stage for member in plan.members for stage in member.stages} == set(STAGES)
    assert len({member.name for member in plan.members}) == len(plan.members) == len(plan.bundles)
    assert [member.bundle for member in plan.members] == list(range(len(plan.members)))
    assert {member.num_threads for member in plan.members} == {3}


def test_members_fit_on_the_machine_with_the_fewest_cpus_per_gpu() -> None:
    assert plan_pool([Node(16, 2), Node(1, 2)], AUTO).bundles[0]["CPU"] == 0.25


def test_device_cpu_leaves_gpus_alone() -> None:
    assert all("GPU" not in bundle for bundle in plan_pool([Node(8, 2)], CPU).bundles)


def test_device_cuda_without_a_gpu_names_the_way_out() -> None:
    with pytest.raises(PoolFailed, match="device=cpu"):
        plan_pool([Node(8)], PoolSettings(device="cuda"))


@pytest.mark.parametrize("nodes", [[], [Node(0)], [Node(0, 1)]])
def test_a_cluster_without_cpus_is_refused(nodes: list[Node]) -> None:
    with pytest.raises(PoolFailed, match="num_cpus"):
        plan_pool(nodes, AUTO)
