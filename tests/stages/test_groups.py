import pytest
import torch

from stages.groups import groups


@pytest.mark.parametrize(("num_sessions", "sizes"), [(0, []), (1, [1]), (2, [2]), (3, [2, 1]), (4, [2, 2])])
def test_a_cpu_takes_two_at_once_and_leaves_nobody_out(num_sessions, sizes):
    parts = groups(num_sessions, torch.device("cpu"))
    assert [len(range(num_sessions)[part]) for part in parts] == sizes
    assert [who for part in parts for who in range(num_sessions)[part]] == list(range(num_sessions))


def test_a_gpu_takes_all_at_once():
    assert groups(5, torch.device("cuda")) == [slice(0, 5)]
    assert groups(0, torch.device("cuda")) == []
