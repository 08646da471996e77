"""TRL 1.16 on PyTorch's CPU backend; its memory is the resident set, PyTorch keeps no figure.

usage: python bench/peers/trl_cpu.py [--prompts N] [--learn DIR]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import RANK, SCALE, K, Stopwatch


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []
    model = str(common.model_of(args))
    task = common.task(args, AutoTokenizer.from_pretrained(model).encode)

    class Steps(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            Steps.start = time.perf_counter()

        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            seconds.append(time.perf_counter() - Steps.start)
            if place := common.kept_at(args, len(seconds)):
                _keep(model, place)

    watch = Stopwatch()
    GRPOTrainer._generate = watch.around(GRPOTrainer._generate)
    with tempfile.TemporaryDirectory() as place:
        config = GRPOConfig(
            output_dir=place,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=K * args.prompts,
            num_generations=K,
            max_completion_length=args.tokens,
            max_steps=1 + args.iterations,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            seed=args.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = GRPOTrainer(
            model=model,
            args=config,
            reward_funcs=[task.rewards_of_turns],
            train_dataset=Dataset.from_list(task.data_set),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=RANK * SCALE, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Steps()],
        )
        trainer.train()
    # a step's rollout happens inside it
    found = common.result(args, K * args.prompts, watch.seconds, seconds, None)
    return found


def _keep(model: Any, place: Path) -> None:
    """PEFT's matrices under mlx-lm's names, the other way round as mlx-lm has them."""
    from safetensors.torch import save_file

    arrays = {
        n.removeprefix("base_model.model.").replace(f".{old}.default.weight", f".{new}"): v.detach()
        for n, v in model.named_parameters()
        for old, new in (("lora_A", "lora_a"), ("lora_B", "lora_b"))
        if f".{old}." in n
    }
    save_file({n: v.T.contiguous() for n, v in arrays.items()}, place)


if __name__ == "__main__":
    requirements = ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft")
    common.main(measure, requirements)
