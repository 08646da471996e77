"""Train a Bradley-Terry reward model and measure it."""
