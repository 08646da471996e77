"""Dates as settings write them: YYYY-MM-DD."""

import datetime


def today() -> str:
    """Today's date, YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def is_date(text: str) -> bool:
    """Whether a text is a date, YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
