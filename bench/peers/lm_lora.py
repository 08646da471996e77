"""mlx-lm-lora 5.10.2, by its own `train_grpo`; `width-k` forces its decode width from 1 to K rows,
`fastest` to all answers, and leaves out the reference.

usage: python bench/peers/lm_lora.py [--variant shipped|width-k|fastest] [--prompts N]
           [--rollout-only] [--learn DIR]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common
from common import RANK, SCALE, K, Stopwatch, Task

ALL_TOKENS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm_lora.trainer import grpo_trainer

    mx.random.seed(args.seed)
    np.random.seed(args.seed)
    model, tokenizer = load(str(common.model_of(args)))
    model.freeze()
    linears = sorted({n for layer in model.layers for n, m in layer.named_modules() if _linear(m)})
    lora = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": linears}
    linear_to_lora_layers(model, len(model.layers), lora)
    if args.variant != "shipped":
        _force_width(grpo_trainer, K * (args.prompts if args.variant == "fastest" else 1))
    watch = Stopwatch()
    grpo_trainer.generate_grpo = watch.around(grpo_trainer.generate_grpo)
    task = common.task(args, tokenizer.encode)
    if args.rollout_only:
        rows = task.rows
        for iteration in range(1 + args.iterations):
            tokens = [r["ids"] for r in (rows if iteration else rows[:1])]
            sampling = (args.tokens, K, 1, "", *ALL_TOKENS.values())
            grpo_trainer.generate_grpo(model, tokenizer, tokens, *sampling)
        iterations: list[float] = []
    else:
        iterations = _train(args, grpo_trainer, model, tokenizer, task)
    peak = common.mlx_peak_gb()
    return common.result(args, K * args.prompts, watch.seconds, iterations, peak)


def _linear(module: Any) -> bool:
    import mlx.nn as nn

    return isinstance(module, nn.Linear)


def _force_width(trainer: Any, rows: int) -> None:
    """Decode so many answers together; as shipped it decodes `batch_size`."""
    generator = trainer.BatchGenerator

    def wide(*args: Any, **kwargs: Any) -> Any:
        sizes = {"completion_batch_size": rows, "prefill_batch_size": rows}
        return generator(*args, **{**kwargs, **sizes})

    trainer.BatchGenerator = wide


def _train(
    args: argparse.Namespace, trainer: Any, model: Any, tokenizer: Any, task: Task
) -> list[float]:
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner.callbacks import TrainingCallback

    class Speed(TrainingCallback):
        seconds: list[float] = []

        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            self.seconds.append(1 / info["iterations_per_second"])
            common.keep_adapter(model, args, info["iteration"])

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return task.rewards(completions, answer)

    fastest, reference = args.variant == "fastest", None
    if not fastest:  # its trainer loads it as a second copy of the model
        reference, _ = load(str(common.model_of(args)))
        reference.freeze()
    speed = Speed()
    with tempfile.TemporaryDirectory() as place:
        trainer.train_grpo(
            model=model,
            ref_model=reference,
            tokenizer=tokenizer,
            optimizer=optim.AdamW(learning_rate=args.learning_rate),
            train_dataset=[
                (r["ids"], [0], r["messages"][-1]["content"], r["fields"], None) for r in task.rows
            ],
            reward_funcs=[reward],
            args=trainer.GRPOTrainingArgs(
                batch_size=args.prompts,
                iters=1 + args.iterations,
                steps_per_report=1,
                steps_per_save=10_000,
                adapter_file=str(Path(place) / "adapters.safetensors"),
                group_size=K,
                **({"beta": 0.0} if fastest else {}),
                max_completion_length=args.tokens,
                epsilon=0.2,
                **ALL_TOKENS,
            ),
            training_callback=speed,
            end_answer_token="",
        )
    return speed.seconds


if __name__ == "__main__":
    common.main(
        measure, (*common.MLX, "mlx-lm-lora==5.10.2"), variants=("shipped", "width-k", "fastest")
    )
