"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input from the user: one line that names file, place, field and remedy. The command line
    exits with 2."""
