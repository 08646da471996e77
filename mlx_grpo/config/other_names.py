"""What other trainers (TRL, Unsloth, mlx-lm, mlx-lm-lora, verl, OpenRLHF) call our settings.

docs/coming-from.md shows the same names side by side; a test holds the two together.
"""

from mlx_grpo.config.settings import SETTINGS

OTHER_NAMES = {
    "K": ("num_generations", "group_size", "n_samples_per_prompt"),
    "actor_model": ("model", "model_name", "model_name_or_path", "model_path", "pretrain"),
    "batch_size": (
        *("per_device_train_batch_size", "generation_batch_size", "train_batch_size"),
        "rollout_batch_size",
    ),
    "chat_template": ("chat_template_path",),
    "checkpoint_every": ("save_steps", "save_every", "steps_per_save", "save_freq"),
    "clip_range": ("epsilon", "epsilon_low", "cliprange", "clip_ratio", "clip_eps", "eps_clip"),
    "clip_range_high": ("epsilon_high", "clip_ratio_high"),
    "epochs": ("ppo_epochs", "num_ppo_epochs"),
    "eval_every": ("eval_steps", "steps_per_eval", "test_freq"),
    "eval_limit": ("val_batches", "test_batches"),
    "eval_prompts": ("eval_dataset", "val_data", "valid_data", "val_files", "eval_data"),
    "early_stopping_patience": ("patience", "early_stopping"),
    "keep": ("save_total_limit",),
    "kl_targets": ("beta", "kl_coef", "init_kl_coef", "kl_loss_coef", "kl_penalty"),
    "learning_rate": ("lr", "actor_learning_rate"),
    "log": ("report_to", "log_with", "use_wandb"),
    "lora_rank": ("lora_r", "rank"),
    "lora_target_modules": ("target_modules", "keys", "lora_keys"),
    "lr_scheduler_type": ("lr_schedule", "lr_scheduler"),
    "lora_alpha": ("alpha",),
    "lora_layers": ("num_layers", "finetune_last_n_layers"),
    "loss_aggregation": ("loss_type", "grpo_loss_type", "loss_agg_mode"),
    "max_completion_length": (
        *("max_new_tokens", "max_tokens", "max_response_length", "generate_max_len"),
        "response_length",
    ),
    "metric_for_best_model": ("metric_for_best", "best_metric"),
    "environment": ("environment_factory", "env"),
    "max_tool_calling_iterations": ("max_turns", "max_tool_calls"),
    "max_grad_norm": ("grad_clip", "max_norm"),
    "max_prompt_length": ("prompt_max_len", "max_seq_length"),
    "minibatch_size": (
        *("mini_batch_size", "ppo_mini_batch_size", "gradient_accumulation_steps"),
        "steps_per_generation",
    ),
    "num_generations_eval": ("val_n", "num_generations_per_eval"),
    "num_iterations": (
        *("max_steps", "iters", "num_steps", "total_steps", "steps", "total_training_steps"),
        *("num_train_epochs", "total_epochs", "iterations"),
    ),
    "output": ("output_dir", "save_path", "adapter_path", "save_dir"),
    "prompts": ("dataset", "dataset_name", "data", "train_data", "train_files", "prompt_data"),
    "ratio_level": ("importance_sampling_level",),
    "reward": ("reward_funcs", "reward_functions", "reward_func"),
    "rm_model": ("reward_model", "reward_model_path", "reward_model_name_or_path"),
    "soft_punish_cache": ("overlong_buffer_len", "overlong_buffer", "soft_overlong_punishment"),
    "truncated": ("mask_truncated_completions", "overlong_filter", "overlong_filtering"),
    "scale_advantages": ("scale_rewards",),
}
"""Our field: names elsewhere. Where two mean nearly the same, the help text says what ours does."""
NOTES = {
    "kl_targets": "which holds the KL at a target in place of a fixed weight",
    "minibatch_size": "which counts prompts per optimizer step",
    "num_iterations": "which counts rollouts; what TRL calls num_iterations is --epochs",
    "truncated": "with the value mask",
    "max_tool_calling_iterations": "which counts answers of tools, one less than turns",
    "batch_size": "which counts prompts per rollout",
}


def ours_for(name: str) -> tuple[str, str] | None:
    """(our field, a note or nothing) for another trainer's name, or ours with underscores."""
    plain = name.strip("-").replace("-", "_").lower()
    own = plain if plain in SETTINGS else None
    found = next((field for field, others in OTHER_NAMES.items() if plain in others), own)
    return (found, NOTES.get(found, "")) if found else None
