"""Prompts, preference pairs and chat templates."""
