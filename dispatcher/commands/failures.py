"""Errors that have a sentence for people instead of a traceback."""

from typing import NamedTuple

from dispatcher.db.pool import DatabaseLost
from dispatcher.db.refusal import Refused
from dispatcher.db.schema import SchemaWrong
from dispatcher.embedded import EmbeddedUnavailable
from dispatcher.settings import SettingsError


class Failed(Exception):
    """A command could not do it; the text is one sentence for people."""


class Misused(Exception):
    """A command was used wrongly; the text is one sentence for people."""


class Told(NamedTuple):
    """What is said of an error, and the exit code that goes with it."""

    sentence: str
    code: int


def told(error: Exception) -> Told | None:
    """The sentence and the exit code for an error; None for one that nobody foresaw."""
    match error:
        case SettingsError() | Misused():
            return Told(str(error), 2)
        case Failed() | EmbeddedUnavailable() | SchemaWrong():
            return Told(str(error), 1)
        case Refused():
            return Told(str(error), 2 if error.wrong_value else 1)
        case DatabaseLost():
            reason = str(error).rstrip(".")
            return Told(
                f"The database cannot be used ({reason}): check DATABASE_URL, and that it runs.",
                1,
            )
        case _:
            return None
