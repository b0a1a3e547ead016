"""What the numbers of a recipe may be. Called by `training.recipes` for every recipe that a command changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from stages.errors import BadConfig

AT_LEAST_ONE = {
    "num_steps", "batch_size", "checkpoint_every", "log_every", "num_frames", "stride", "gradient_every",
    "critic_channels",
}  # fmt: skip
ABOVE_ZERO = {"learning_rate", "epsilon", "max_gradient_norm"}
SHARES = {
    "drop_reference", "drop_pose", "drop_motion", "drop_reference_tokens", "negative_share", "mild_share",
    "portrait_first", "augment", "level_shares",
}  # fmt: skip
BELOW_ONE = {"ema_decay", "betas"}
TOLERANCE = 1e-6


def check_phase(name: str, config: Any, num_levels: int) -> None:
    """Raises BadConfig, naming the field, for a phase's numbers that make no sense. `num_levels`: of the window."""
    for field, number in _numbers(name, config):
        if wrong := _wrong(field.rpartition(".")[2], number):
            raise BadConfig(f"recipe: {field} {number:g} {wrong}")
    if len(betas := config.optimiser.betas) != 2:
        raise BadConfig(f"recipe: {name}.optimiser.betas are two numbers, not {len(betas)}")
    shares = getattr(config, "level_shares", ())
    if shares and (len(shares) != num_levels or abs(sum(shares) - 1) > TOLERANCE):
        raise BadConfig(f"recipe: {name}.level_shares must be {num_levels} numbers, one per level, whose sum is 1")
    if getattr(config, "adversarial_weight", 0) and config.critic_from_step > config.adversarial_from_step:
        raise BadConfig(
            f"recipe: {name}.critic_from_step {config.critic_from_step} is behind adversarial_from_step "
            f"{config.adversarial_from_step}: a discriminator that has learned nothing would be listened to"
        )


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a config, with its dotted name."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, tuple):
        for entry in value:
            yield from _numbers(name, entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _wrong(field: str, number: float) -> str | None:
    """What is wrong with a number in a field of that name."""
    bounds = [
        (not math.isfinite(number), "must be finite"),
        (field in AT_LEAST_ONE and number < 1, "must be at least 1"),
        (field in ABOVE_ZERO and number <= 0, "must be above 0"),
        (field in SHARES and number > 1, "is a share: 0 to 1"),
        (field in BELOW_ONE and number >= 1, "must be below 1"),
        (number < 0, "must be 0 or more"),
    ]
    return next((message for is_wrong, message in bounds if is_wrong), None)
