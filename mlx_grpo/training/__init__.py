"""The loop around the algorithm: set up, evaluate, save, resume."""
