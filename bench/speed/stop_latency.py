"""Seconds from SIGTERM to exit on a real model: the demo's run, stopped at random times.

python bench/speed/stop_latency.py [--runs 8] [--model weights/sft-4bit] [--rm weights/rm-4bit]
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FLAGS = (
    *("--batch-size", "4", "--minibatch-size", "2", "--max-completion-length", "48"),
    *("--update-rows", "0", "--kl-share", "1"),
    *("--eval-limit", "1", "--checkpoint-every", "5", "--num-iterations", "50"),
)
STOPPED = 130
"""Exit status of a run that a signal ended early."""
PATIENCE = 50.0
"""Longest wait after the first evaluation: an iteration takes about 35 s."""


def stop_once(model: str, rm: str, run: Path, rng: random.Random) -> float:
    """Start a run, stop it within its first iterations, and wait: seconds."""
    paths = ["--actor-model", model, "--rm-model", rm, "--output", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_grpo", "train", *FLAGS, *paths], cwd=REPOSITORY
    )
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(rng.uniform(0, PATIENCE))
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    if (status := process.wait()) != STOPPED:
        raise RuntimeError(f"exit status {status}")
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--model", default="weights/sft-4bit")
    parser.add_argument("--rm", default="weights/rm-4bit")
    given = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        seconds = sorted(
            stop_once(given.model, given.rm, Path(place) / str(i), rng) for i in range(given.runs)
        )
    print("seconds to exit:", ", ".join(f"{s:.2f}" for s in seconds))


if __name__ == "__main__":
    main()
