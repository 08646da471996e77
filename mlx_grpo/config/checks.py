"""Refuse settings that cannot work, naming flag, value and bound."""

import re
from dataclasses import fields
from typing import Any

from mlx_grpo.config.settings import TrainConfig, flag_of
from mlx_grpo.core.errors import InputError
from mlx_grpo.data.clock import is_date

POSITIVE = {
    "temperature",
    "learning_rate",
    "max_grad_norm",
    "lora_scale",
    "reward_clip",
    "reward_timeout",
    "kl_beta",
    "kl_gain",
}
AT_LEAST_ZERO = {
    "seed",
    "decode_rows",
    "rows_per_pass",
    "eval_limit",
    "weight_decay",
    "kl_stop_factor",
    "lora_blocks",
    "clip_range_high",
    "show_every",
    "patience",
}


def need(config: Any, name: str, condition: bool, rule: str) -> None:
    """Raise InputError that `name` must be `rule` unless `condition` holds."""
    if not condition:
        raise InputError(f"{flag_of(name)}: must be {rule}, not {getattr(config, name)!r}")


def parse_bytes(text: str) -> int:
    """Bytes of a text such as 2.5GB (10^9) or 6GiB (2^30); 0 where it is empty.

    Raises:
        InputError: it is no such text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if text and (not found or not float(found[1])):
        raise InputError(f"--memory-limit: must be bytes such as 2.5GB or 6GiB, not {text!r}")
    if not found:
        return 0
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def check_ranges(config: Any) -> None:
    """Refuse numbers no configuration can work with: counts below 1, rates not positive.

    Raises:
        InputError: naming flag, value and bound.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if name == "template_date":
            need(config, name, not value or is_date(value), "a date such as 2026-01-31")
        elif name in POSITIVE:
            need(config, name, value > 0, "more than 0")
        elif name in AT_LEAST_ZERO:
            need(config, name, value >= 0, "0 or more")
        elif type(value) is int:
            need(config, name, value >= 1, "at least 1")
        elif name == "valid_fraction":
            need(config, name, 0 <= value < 1, "at least 0 and below 1")
        elif name == "test_fraction":
            need(config, name, 0 < value < 1, "between 0 and 1")


def check(config: TrainConfig) -> None:
    """Refuse values that cannot work.

    Raises:
        InputError: naming flag, value and bound.
    """
    check_ranges(config)
    c = config
    parse_bytes(c.memory_limit)
    need(c, "K", c.K >= 2, "at least 2: an advantage compares the answers of a group")
    need(c, "clip_range", 0 < c.clip_range < 1, "between 0 and 1")
    need(c, "reward_alpha", 0 <= c.reward_alpha < 1, "at least 0 and below 1")
    need(
        c, "kl_targets", bool(c.kl_targets) and min(c.kl_targets) > 0, "one or more numbers above 0"
    )
    need(
        c,
        "kl_phases",
        len(c.kl_phases) in (0, len(c.kl_targets)),
        "as many numbers as --kl-targets",
    )
    need(c, "kl_phases", all(p > 0 for p in c.kl_phases), "numbers above 0")
    need(
        c,
        "kl_beta_min",
        0 < c.kl_beta_min <= c.kl_beta <= c.kl_beta_max,
        "at most kl-beta <= kl-beta-max",
    )
    need(c, "kl_lr_min", 0 < c.kl_lr_min <= c.kl_lr_max, "above 0 and at most kl-lr-max")
    if c.kl_control == "lr":
        within = c.kl_lr_min <= c.learning_rate <= c.kl_lr_max
        need(c, "learning_rate", within, "between kl-lr-min and kl-lr-max")
    check_rewards(config)


def check_rewards(config: TrainConfig) -> None:
    """Refuse rewards that cannot be added up; not before those given as Python objects are known.

    Raises:
        InputError: naming flag, value and bound.
    """
    c = config
    need(
        c,
        "reward_weights",
        len(c.reward_weights) in (0, len(c.reward)),
        "as many numbers as --reward",
    )
    need(c, "rm_model", c.rm_model != "none" or bool(c.reward), "a directory, or give --reward")
