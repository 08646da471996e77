"""What single model families need, a file each."""
