"""Unsloth-zoo 2026.10.9, its MLX GRPO trainer: fastest (no checkpointing, no KL) and leanest.

usage: python bench/peers/unsloth_zoo_mlx.py [--variant default|fastest|leanest] [--prompts N]
           [--learn DIR]

`leanest` takes one answer per gradient pass. It runs on Linux with its own
`UNSLOTH_ZOO_DISABLE_GPU_INIT=1`.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

import common
from common import RANK, SCALE, K, Stopwatch


def measure(args: argparse.Namespace) -> dict[str, Any]:
    os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"
    from unsloth_zoo.mlx.grpo import GRPOBatchPlan
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXGRPOConfig, MLXGRPOTrainer

    model, tokenizer = FastMLXModel.from_pretrained(
        str(common.model_of(args)),
        max_seq_length=512,
        dtype="float32",
        load_in_4bit=False,
    )
    fastest, leanest = args.variant == "fastest", args.variant == "leanest"
    model = FastMLXModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK * SCALE,
        use_gradient_checkpointing=False if fastest else "mlx",
    )
    watch = Stopwatch()
    GRPOBatchPlan._generate = watch.around(GRPOBatchPlan._generate)
    rows = K * args.prompts
    task = common.task(args, tokenizer.encode)
    with tempfile.TemporaryDirectory() as place:
        config = MLXGRPOConfig(
            output_dir=place,
            per_device_train_batch_size=1 if leanest else rows,
            gradient_accumulation_steps=rows if leanest else 1,
            num_generations=K,
            max_completion_length=args.tokens,
            max_seq_length=512,
            max_steps=1 + args.iterations,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            seed=args.seed,
            logging_steps=1,
            save_steps=10_000,
            **({"beta": 0.0} if fastest else {}),
        )
        seconds: list[float] = []
        trainer = MLXGRPOTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=task.data_set,
            args=config,
            reward_funcs=[task.rewards_of_turns],
            callbacks=[_steps(seconds, lambda: common.keep_adapter(model, args, len(seconds)))],
        )
        trainer.train()
    return common.result(args, rows, watch.seconds, seconds, common.mlx_peak_gb())


def _steps(seconds: list[float], after_each: Callable[[], None]) -> Any:
    """A callback that times whole optimizer steps."""
    import time

    class Steps:
        start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - Steps.start)
            after_each()
            Steps.start = time.perf_counter()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("on_"):
                return lambda *_, **__: None
            raise AttributeError(name)

    return Steps()


if __name__ == "__main__":
    requirements = (
        *common.MLX,
        "transformers==5.17.0",
        "datasets>=4.6,<5",
        *("psutil", "protobuf", "sentencepiece", "tqdm", "msgspec", "requests", "pillow", "regex"),
        *("filelock", "packaging", "typing_extensions", "jinja2", "wheel"),
    )
    bare = ("unsloth-zoo==2026.10.9",)
    common.main(measure, requirements, bare, variants=("default", "fastest", "leanest"))
