"""Several machines that share the prompts of an iteration."""
