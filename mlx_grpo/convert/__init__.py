"""Source checkpoints to verified MLX directories; a directory is complete or absent."""
