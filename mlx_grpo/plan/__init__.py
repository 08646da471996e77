"""Before a run: how much memory and time it takes, and what fits."""
