"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input: one line with file, place, field and remedy; the command line exits with 2."""


def one_line(error: object) -> str:
    """The beginning of another library's complaint, without line breaks."""
    return " ".join(str(error).split())[:300]
