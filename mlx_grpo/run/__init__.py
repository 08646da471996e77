"""A run on disk: settings, logs, checkpoints, provenance."""
