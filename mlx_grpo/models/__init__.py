"""One frozen backbone, several roles: actor, reference and reward model share its arrays."""
