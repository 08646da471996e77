"""`python -m mlx_grpo` is `mlx-grpo`."""

import sys

from mlx_grpo.cli import main

sys.exit(main())
