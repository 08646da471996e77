"""TRL 1.16 on PyTorch's CPU backend; its memory is the resident set, PyTorch keeps no figure.

usage: python bench/peers/trl_cpu.py [--prompts N]
"""

import argparse
import tempfile
import time
from typing import Any

import common
from common import LEARNING_RATE, MODEL, RANK, SCALE, SEED, K, Stopwatch


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Steps(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            Steps.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - Steps.start)

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
            learning_rate=LEARNING_RATE,
            seed=SEED,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = GRPOTrainer(
            model=str(MODEL),
            args=config,
            reward_funcs=[_length],
            train_dataset=Dataset.from_list(
                [{"prompt": r["messages"]} for r in common.prompts(args.prompts)]
            ),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=RANK * SCALE, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Steps()],
        )
        trainer.train()
    # a step's rollout happens inside it
    found = common.result(args, K * args.prompts, watch.seconds, seconds, None)
    return found


def _length(completions: list[Any], **_: Any) -> list[float]:
    return common.length_reward([c[0]["content"] for c in completions])


if __name__ == "__main__":
    requirements = ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft")
    common.main(measure, requirements)
