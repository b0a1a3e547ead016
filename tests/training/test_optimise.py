"""Schedule, clipping, averaged weights and the state of the optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.optimise import (
    apply_gradients,
    average_gradients,
    copy_into,
    follow,
    learning_rate,
    make_learner,
    mean_over_ranks,
    new_average,
    optimiser_tensors,
    restore_optimiser,
)
from training.recipes import OptimiserConfig


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def learner(net):
    return make_learner(dict(net.named_parameters()), 1e-2, OptimiserConfig())


def backward(net, scale=1.0):
    net(torch.arange(12.0).view(4, 3)).square().mean().mul(scale).backward()


def test_a_constant_rate_rises_and_stays():
    config = OptimiserConfig(num_warmup_steps=4)
    assert [learning_rate(config, 2.0, step, 100) for step in (0, 1, 3, 50, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_a_cosine_rate_ends_at_a_fiftieth():
    config = OptimiserConfig(schedule="cosine")
    rates = [learning_rate(config, 1.0, step, 11) for step in range(11)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[5], rates[10]) == pytest.approx((1.0, 0.51, 0.02))


def test_large_gradients_are_clipped_to_the_norm():
    net = network()
    learning = learner(net)
    backward(net, 1e4)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    assert apply_gradients(learning, 1e-2, 0.5)
    first_moments = torch.cat([state["exp_avg"].flatten() for state in learning.optimiser.state.values()])
    assert float(first_moments.norm()) == pytest.approx(0.5 * (1 - 0.9), rel=1e-4)
    assert all(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(scale):
    net = network()
    learning = learner(net)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    backward(net, scale)
    assert not apply_gradients(learning, 1e-2, 1.0)
    assert not learning.optimiser.state
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_a_restored_optimiser_goes_on_bit_equal():
    first, second = network(), network()
    one, other = learner(first), learner(second)
    for _ in range(3):
        backward(first)
        apply_gradients(one, 1e-2, 1.0)
    copy_into(dict(second.named_parameters()), dict(first.named_parameters()))
    restore_optimiser(other, optimiser_tensors(one))
    for net, learning in ((first, one), (second, other)):
        backward(net)
        apply_gradients(learning, 1e-2, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_parameters_that_never_had_a_gradient_have_no_state():
    net = network()
    learning = learner(net)
    net[0](torch.ones(1, 3)).sum().backward()
    apply_gradients(learning, 1e-2, 1.0)
    assert {name.split("|")[0] for name in optimiser_tensors(learning)} == {"0.weight", "0.bias"}


def test_averaged_weights_follow_fast_at_first_and_then_by_the_decay():
    parameter = {"weight": nn.Parameter(torch.zeros(2))}
    average = new_average(parameter)
    parameter["weight"].data.fill_(1.0)
    follow(average, parameter, 0.99, 0)
    assert average["weight"].tolist() == pytest.approx([0.9, 0.9])
    follow(average, parameter, 0.99, 100_000)
    assert average["weight"].tolist() == pytest.approx([0.901, 0.901])


def test_copying_keeps_memory_layout_and_type():
    target = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    copy_into({"a": target}, {"a": torch.arange(120.0).view(2, 3, 4, 5)})
    assert target.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(target, torch.arange(120.0).view(2, 3, 4, 5))


def test_one_rank_alone_is_its_own_mean():
    net = network()
    backward(net)
    before = [parameter.grad.clone() for parameter in net.parameters()]
    average_gradients(net.parameters())
    assert all(torch.equal(old, p.grad) for old, p in zip(before, net.parameters(), strict=True))
    assert float(mean_over_ranks(torch.tensor(3.0))) == 3.0
