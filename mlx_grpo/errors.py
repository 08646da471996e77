"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input: one line with file, place, field and remedy; the command line exits with 2."""
