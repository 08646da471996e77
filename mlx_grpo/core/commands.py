"""Commands that people are told to type."""

import shlex


def command(*words: object) -> str:
    """The words as a shell reads them back, whatever blanks and quotes a path holds."""
    return shlex.join(map(str, words))
