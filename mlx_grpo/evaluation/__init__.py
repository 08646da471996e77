"""A finished run compared with the SFT model."""
