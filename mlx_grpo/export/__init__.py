"""A finished run in the form somebody else wants."""
