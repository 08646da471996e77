"""The algorithm. Start with `iteration.py`; the stages it calls are the files beside it."""
