"""Imported first: users have no torch, and importing it would cost every process here seconds."""

import os
import sys

sys.modules["torch"] = None  # type: ignore[assignment]
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
