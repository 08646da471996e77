"""Memory of actor, reference and reward adapter on one backbone, against the backbone alone.

usage: python bench/memory/roles.py [--model weights/sft-4bit] [--rm weights/rm-4bit] [--rank 16]

Prints MLX's active memory after each load.
"""

import mlx_grpo  # noqa: F401  isort: skip  (first: it loads OpenBLAS before MLX)
import argparse
from pathlib import Path

import mlx.core as mx

from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.decoder import Decoder
from mlx_grpo.models.reward_model import load_reward_model
from mlx_grpo.models.roles import Roles, new_actor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("weights/sft-4bit"))
    parser.add_argument("--rm", type=Path, default=Path("weights/rm-4bit"))
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    backbone = load_backbone(args.model)
    mx.clear_cache()
    alone = mx.get_active_memory()
    actor = new_actor(backbone, args.rank, 2.0, 0)
    reward_model = load_reward_model(args.rm, backbone)
    roles = Roles(backbone, actor, Decoder(backbone.model))
    mx.eval(roles.actor.model.parameters(), reward_model.decoder.model.parameters())
    mx.clear_cache()
    together = mx.get_active_memory()
    print(f"backbone alone:                           {alone / 1e6:8.1f} MB")
    print(f"with actor, reference and reward adapter: {together / 1e6:8.1f} MB")
    print(f"more by:                                  {together / alone - 1:8.1%}")


if __name__ == "__main__":
    main()
