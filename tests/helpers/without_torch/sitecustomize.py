"""Put first on PYTHONPATH: plain users have no torch, and importing it would take each process of
the tests a second or more."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
