import pytest
import torch

from stages.groups import groups


@pytest.mark.parametrize(("num_sessions", "sizes"), [(0, []), (1, [1]), (2, [2]), (3, [2, 1]), (4, [2, 2])])
def test_a_cpu_takes_two_at_once_and_leaves_nobody_out(num_sessions, sizes):
    parts = groups(num_sessions, torch.zeros(1))
    assert [len(range(num_sessions)[part]) for part in parts] == sizes
    assert [who for part in parts for who in range(num_sessions)[part]] == list(range(num_sessions))


def test_in_bfloat16_each_goes_alone():
    assert groups(3, torch.zeros(1, dtype=torch.bfloat16)) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_a_gpu_takes_all_at_once():
    # Tensors of the meta device stand for those of any device that is not the CPU.
    assert groups(5, torch.zeros(1, device="meta")) == [slice(0, 5)]
    assert groups(0, torch.zeros(1, device="meta")) == []
