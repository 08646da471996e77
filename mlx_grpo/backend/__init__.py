"""Where the arithmetic happens: device, precision, kernels. Imported before MLX itself."""
