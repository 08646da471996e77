"""A first run on a GPU."""
