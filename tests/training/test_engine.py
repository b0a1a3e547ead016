"""The loop of a worker with real small networks: updates, critic, skipping, exact resumption, two ranks."""

from __future__ import annotations

import dataclasses
import multiprocessing
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from stages.config import ModelConfig
from stages.errors import BadConfig
from training.checkpoints import BadResume, CheckpointFailed, newest_checkpoint
from training.clips import Batch, Sampling
from training.engine import NotFinite, Run, train_phase
from training.phases.phase import Phase, Update
from training.recipes import DistillConfig, OptimiserConfig

NUM_STEPS, KILLED_AT = 7, 4
OPTIMISER = OptimiserConfig(learning_rate=1e-2, critic_learning_rate=3e-3, ema_decay=0.9, num_warmup_steps=2)
CONFIG = DistillConfig(
    num_steps=NUM_STEPS,
    batch_size=3,
    sampling=Sampling(1, "spread"),
    optimiser=OPTIMISER,
    checkpoint_every=3,
    log_every=2,
    critic_from_step=2,
)


class Killed(Exception):
    """Stands for a death between two steps."""


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.judge = nn.Linear(3 * 4 * 4, 1)

    def forward(self, pictures, timesteps):
        return self.judge(pictures.flatten(1)) + timesteps[:, None]


class Sketch(Phase):
    """Reconstructs 4x4 pictures through two layers in two updates, the second of which knows of the first; one network
    is left out by some ranks in some steps. Drops out, keeps a moving buffer and has a critic."""

    num_updates = 2

    def __init__(self, broken_steps=(), share=0.5):
        torch.manual_seed(5)
        super().__init__(ModelConfig(), {"vae": nn.Conv2d(3, 3, 3, padding=1), "pose_guider": nn.Linear(4, 4)})
        self.critic = Critic()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("deviation", torch.ones(()))
        self.broken_steps = broken_steps
        self.share = share
        self.seen = []

    def forward(self, batch, draw, step, index, carry):
        pictures = torch.from_numpy(batch.pixels[:, 0]).movedim(-1, 1).float() / 255
        self.deviation.mul_(0.9).add_(0.1 * pictures.std())
        made = self.networks["vae"](pictures + 0.1 * draw.normal(pictures)).float() * self.deviation
        if draw.numpy.random() < self.share:
            made = self.networks["pose_guider"](made).float()
        made = F.dropout(made, 0.1) + (0.0 if carry is None else carry)
        judged = F.softplus(-self.critic(made, torch.zeros(len(made)))).mean()
        loss = (made - pictures).square().mean() + 0.1 * judged
        if step in self.broken_steps:
            loss = loss * float("nan")
        self.seen.append((step, index, carry))
        return Update(loss, {"judged": judged}, loss.detach() * 0.01, pictures, made.detach(), torch.zeros(len(made)))


def batches_from(start, rank=0, killed_at=None):
    """Batches that are functions of their number and the rank."""
    for number in count(start):
        if number == killed_at:
            raise Killed
        pixels = np.random.default_rng([number, rank]).integers(0, 256, (3, 2, 4, 4, 3)).astype(np.uint8)
        nothing = np.zeros(0)
        yield Batch(pixels, nothing, nothing, nothing, nothing, (("clip", "truncated"),) if number == 1 else ())


def trained(place, phase=None, config=CONFIG, report=lambda metrics: None, **how):
    """A whole run of one rank."""
    phase = phase or Sketch()
    train_phase(phase, Run("distill", phase.model, config), lambda n: batches_from(n, **how), place, report)
    return newest_checkpoint(place / "checkpoints")


def assert_same(one, other):
    assert one.state == other.state and one.groups.keys() == other.groups.keys()
    for name, tensors in one.groups.items():
        assert tensors.keys() == other.groups[name].keys()
        different = [key for key, tensor in tensors.items() if not torch.equal(tensor, other.groups[name][key])]
        assert not different, (name, different)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("killed_at", [1, 3, 5, 6])
def test_a_run_killed_at_a_step_ends_bit_equal_to_one_that_never_was(tmp_path, undisturbed, killed_at):
    with pytest.raises(Killed):
        trained(tmp_path, killed_at=killed_at)
    assert_same(trained(tmp_path), undisturbed)


def test_everything_that_learns_is_in_the_checkpoint_and_nothing_else(undisturbed):
    learning = {f"networks.{name}" for name in ("vae.weight", "vae.bias", "pose_guider.weight", "pose_guider.bias")}
    assert undisturbed.groups["weights"].keys() == learning | {"deviation"}
    assert undisturbed.groups["average"].keys() == learning
    assert undisturbed.groups["critic"].keys() == {"judge.weight", "judge.bias"}
    assert float(undisturbed.groups["optimiser"]["networks.vae.weight|step"]) == 2 * NUM_STEPS
    assert float(undisturbed.groups["critic_optimiser"]["judge.bias|step"]) == 2 * (NUM_STEPS - 2)


def test_updates_of_a_batch_follow_one_another_with_what_the_last_one_left(tmp_path):
    phase = Sketch()
    trained(tmp_path, phase)
    assert [(step, index) for step, index, _ in phase.seen] == [(s, i) for s in range(NUM_STEPS) for i in range(2)]
    assert all((carry is None) == (index == 0) for _, index, carry in phase.seen)


def test_the_critic_rests_until_its_step_and_is_frozen_afterwards(tmp_path):
    phase = Sketch()
    before = phase.critic.judge.weight.detach().clone()
    few = DistillConfig(num_steps=2, optimiser=OPTIMISER, critic_from_step=2)
    found = trained(tmp_path, phase, few)
    assert torch.equal(found.groups["critic"]["judge.weight"], before)
    assert not any(parameter.requires_grad for parameter in phase.critic.parameters())


def test_the_phase_ends_with_its_averaged_weights(tmp_path):
    phase = Sketch()
    found = trained(tmp_path, phase)
    average, last = (found.groups[group]["networks.vae.weight"] for group in ("average", "weights"))
    assert torch.equal(phase.networks["vae"].weight, average) and not torch.equal(average, last)


def test_without_a_decay_the_phase_ends_with_its_last_weights(tmp_path):
    phase = Sketch()
    found = trained(tmp_path, phase, DistillConfig(num_steps=2, optimiser=OptimiserConfig(1e-2)))
    assert torch.equal(phase.networks["vae"].weight, found.groups["weights"]["networks.vae.weight"])


def test_reports_come_at_their_steps_and_name_what_was_left_out(tmp_path):
    reports = []
    trained(tmp_path, Sketch(broken_steps=(3,)), report=reports.append)
    assert [report["step"] for report in reports] == [2, 4, 6, 7]
    assert [report["num_skipped"] for report in reports] == [0, 1, 1, 1]
    assert [report["num_bad"] for report in reports] == [1, 0, 0, 0]
    assert all(np.isfinite(report["loss"]) and report["samples_per_s"] > 0 for report in reports)
    assert "critic_loss" not in reports[0] and "critic_loss" in reports[1] and "judged" in reports[0]


def test_a_step_that_is_not_finite_changes_nothing_and_warns(tmp_path, caplog):
    phase, config = Sketch(broken_steps=(0,)), DistillConfig(num_steps=1, optimiser=OPTIMISER)
    found = trained(tmp_path, phase, config)
    fresh = dict(Sketch().named_parameters())
    assert all(torch.equal(found.groups["weights"][name], fresh[name]) for name in found.groups["average"])
    assert float(found.groups["weights"]["deviation"]) == 1.0
    assert not found.groups["optimiser"] and found.state.num_skipped == 1
    assert [index for _, index, _ in phase.seen] == [0]
    assert "step 0: the loss or a gradient is not finite" in caplog.text


def test_twenty_bad_steps_in_a_row_end_the_run_and_name_the_step(tmp_path):
    phase, config = Sketch(broken_steps=range(2, 99)), DistillConfig(num_steps=99, optimiser=OPTIMISER)
    with pytest.raises(NotFinite, match=r"step 21.*20 times"):
        trained(tmp_path, phase, config)


def test_a_run_that_is_done_opens_no_data(tmp_path, undisturbed):
    trained(tmp_path)
    assert_same(trained(tmp_path, killed_at=NUM_STEPS), undisturbed)


def test_another_recipe_is_refused_in_place_of_a_checkpoint(tmp_path):
    trained(tmp_path)
    other = DistillConfig(num_steps=NUM_STEPS, batch_size=4, optimiser=OPTIMISER)
    with pytest.raises(BadResume, match=r"config.batch_size was 3 and is 4"):
        trained(tmp_path, config=other)


def test_a_phase_that_trains_nothing_is_an_error(tmp_path):
    phase = Sketch()
    phase.requires_grad_(False)
    with pytest.raises(BadConfig, match="trains nothing"):
        trained(tmp_path, phase)


def test_checkpoints_that_cannot_be_written_end_the_run_only_at_its_end(tmp_path, caplog):
    (tmp_path / "checkpoints").write_text("in the way")
    reports = []
    with pytest.raises(CheckpointFailed, match="step-00000007"):
        trained(tmp_path, report=reports.append)
    assert reports[-1]["step"] == NUM_STEPS
    assert "step-00000003" in caplog.text and "training goes on" in caplog.text


def rank_of_two(rank, folder, failed):
    """What each of two processes does: runs with DDP and with FSDP2, undisturbed, and killed and resumed."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        run = Run("distill", ModelConfig(), CONFIG, num_workers=2)
        steady = dataclasses.replace(run, config=dataclasses.replace(CONFIG, bfloat16=False))
        for sharded in (False, True):
            for name, killed_at in (("whole", None), ("killed", KILLED_AT), ("killed", None), ("steady", None)):
                place = Path(folder) / f"{name}-{sharded}"

                def source(start, killed_at=killed_at):
                    return batches_from(start, rank, killed_at)

                phase, this = (Sketch(share=1.0), steady) if name == "steady" else (Sketch(), run)
                try:
                    train_phase(phase, this, source, place, lambda metrics: None, rank, sharded=sharded)
                except Killed:
                    assert killed_at
    except BaseException as error:
        failed.put(repr(error))
        raise


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    # Imported once, for both.
    context.set_forkserver_preload([__name__, "torch", "training.engine"])
    failed = context.Queue()
    ranks = [context.Process(target=rank_of_two, args=(rank, str(folder), failed)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert failed.empty(), failed.get()
    assert [process.exitcode for process in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_ranks_that_were_killed_end_bit_equal_to_two_that_never_were(two_ranks, sharded):
    whole, killed = (newest_checkpoint(two_ranks / f"{name}-{sharded}/checkpoints") for name in ("whole", "killed"))
    assert whole.state.step == NUM_STEPS
    assert_same(whole, killed)


def test_sharded_ranks_learn_what_wrapped_ranks_learn_where_no_network_is_left_out(two_ranks):
    wrapped, sharded = (newest_checkpoint(two_ranks / f"steady-{kind}/checkpoints") for kind in (False, True))
    for name, tensor in wrapped.groups["weights"].items():
        torch.testing.assert_close(sharded.groups["weights"][name], tensor, atol=1e-5, rtol=1e-4)
