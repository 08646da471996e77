"""GRPO (Group Relative Policy Optimization, Shao et al. 2024, arXiv:2402.03300) with MLX.

The way of the data: prompts -> rollout -> reward -> advantage -> log-probs -> loss -> update ->
checkpoint. One module per stage; `trainer.py` is the only place where the order is visible.
"""

from mlx_grpo import backend as backend  # first of all imports: it loads the BLAS that MLX will use

__version__ = "0.1.0"
