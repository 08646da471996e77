"""Refuse settings that cannot work, naming flag, value and bound."""

import math
import re
from collections.abc import Mapping
from typing import Any

from mlx_grpo.config.settings import RewardTrainConfig, TrainConfig, flag_of, flat_values
from mlx_grpo.core.dates import is_date
from mlx_grpo.core.errors import InputError

POSITIVE = {
    "temperature",
    "learning_rate",
    "max_grad_norm",
    "lora_scale",
    "reward_clip",
    "reward_timeout",
    "tool_timeout",
    "kl_beta",
    "kl_gain",
}
AT_LEAST_ZERO = {
    "seed",
    "decode_rows",
    "rows_per_pass",
    "eval_limit",
    "eval_temperature",
    "soft_punish_cache",
    "early_stopping_patience",
    "weight_decay",
    "kl_stop_factor",
    "expert_lora_rank",
    "lora_blocks",
    "lora_layers",
    "lora_alpha",
    "warmup_ratio",
    "update_rows",
    "clip_range_high",
    "show_every",
    "max_tool_calling_iterations",
    "patience",
}


def need(flat: str, value: Any, condition: bool, rule: str) -> None:
    """Raise InputError that a flag must be `rule` unless `condition` holds."""
    if not condition:
        raise InputError(f"{flag_of(flat)}: must be {rule}, not {value!r}")


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


def check_ranges(values: Mapping[str, Any]) -> None:
    """Refuse numbers no configuration can work with: counts below 1, rates not positive.

    Raises:
        InputError: naming flag, value and bound.
    """
    for name, value in values.items():
        if name == "template_date":
            need(name, value, not value or is_date(value), "a date such as 2026-01-31")
        elif name in POSITIVE:
            need(name, value, value > 0, "more than 0")
        elif name in AT_LEAST_ZERO:
            need(name, value, value >= 0, "0 or more")
        elif type(value) is int:
            need(name, value, value >= 1, "at least 1")


def check_reward_training(config: RewardTrainConfig) -> None:
    """Refuse values that cannot work in training a reward model.

    Raises:
        InputError: naming flag, value and bound.
    """
    check_ranges(vars(config))
    valid, test = config.valid_fraction, config.test_fraction
    need("valid_fraction", valid, 0 <= valid < 1, "at least 0 and below 1")
    need("test_fraction", test, 0 < test < 1, "between 0 and 1")


def check(config: TrainConfig, more_rewards: bool = False) -> None:
    """Refuse values that cannot work.

    Args:
        more_rewards: reward functions may follow as Python objects, so whether the rewards fit
            together is not checked yet.

    Raises:
        InputError: naming flag, value and bound.
    """
    values = flat_values(config)
    check_ranges(values)
    parse_bytes(config.run.memory_limit)

    def must(flat: str, condition: bool, rule: str) -> None:
        need(flat, values[flat], condition, rule)

    k = config.rollout.K
    must("K", k >= 2, "at least 2: an advantage compares the completions of a group")
    rows = config.optimizer.update_rows
    must("update_rows", rows == 0 or rows >= 2, "0, or at least 2")
    must("clip_range", 0 < config.optimizer.clip_range < 1, "between 0 and 1")
    must("reward_alpha", 0 <= config.reward.alpha < 1, "at least 0 and below 1")
    longest = config.rollout.max_completion_length
    within = config.reward.soft_punish_cache <= longest
    must("soft_punish_cache", within, "0, or at most --max-completion-length")
    tests = config.evaluation
    must("test_prompts", len(tests.test_names) == len(tests.tests), "files of different names")
    if not more_rewards:
        _check_rewards(config, must)
    _check_kl(config, must)
    _check_scales(config, must)


def _check_rewards(config: TrainConfig, must: Any) -> None:
    reward = config.reward
    counts = (0, len(reward.functions))
    must("reward_weights", len(reward.weights) in counts, "as many numbers as --reward")
    some = reward.model != "none" or bool(reward.functions or config.rollout.environment)
    must("rm_model", some, "a directory, or give --reward or --environment")


def _check_scales(config: TrainConfig, must: Any) -> None:
    model, reward = config.model, config.reward
    scale = model.lora_alpha / model.lora_rank
    same = math.isclose(scale, model.lora_scale, rel_tol=1e-6)
    must("lora_scale", not scale or same, f"{scale:g}, which is --lora-alpha / --lora-rank")
    must("warmup_ratio", config.optimizer.warmup_ratio < 1, "below 1")
    if reward.multi_objective_aggregation == "normalize_then_sum":
        rule = "none with --multi-objective-aggregation normalize_then_sum, which scales them"
        must("scale_advantages", reward.scale_advantages == "none", rule)


def _check_kl(config: TrainConfig, must: Any) -> None:
    kl = config.kl
    must("kl_targets", bool(kl.targets) and min(kl.targets) > 0, "one or more numbers above 0")
    must("kl_phases", len(kl.phases) in (0, len(kl.targets)), "as many numbers as --kl-targets")
    must("kl_phases", all(p > 0 for p in kl.phases), "numbers above 0")
    must("kl_share", 0 < kl.share <= 1, "above 0 and at most 1")
    betas = 0 < kl.beta_min <= kl.beta <= kl.beta_max
    must("kl_beta_min", betas, "above 0, with --kl-beta-min <= --kl-beta <= --kl-beta-max")
    must("kl_lr_min", 0 < kl.lr_min <= kl.lr_max, "above 0 and at most --kl-lr-max")
    if kl.control == "lr":
        within = kl.lr_min <= config.optimizer.learning_rate <= kl.lr_max
        must("learning_rate", within, "between --kl-lr-min and --kl-lr-max")
