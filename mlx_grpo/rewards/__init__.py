"""Raw rewards: reward model, custom functions, normaliser."""
