"""`python -m mlx_grpo` is `mlx-grpo`."""

from mlx_grpo.cli import main

main()
