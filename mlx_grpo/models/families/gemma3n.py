"""Gemma 3n in mlx-lm: blocks that share keys and values find them in a cache.

Without a cache they compute their own, with weights that are not meant for it: whole sequences need
caches as well.
"""

WITHOUT_LORA = ("altup.correction_coefs", "altup.prediction_coefs")
"""Linear layers of a block whose `weight` the block itself reads and replaces: a LoRA has none."""
