"""What the database refuses, in its own words but without the rows it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg


class Refused(Exception):
    """The database refuses a statement or a connection; the text is one sentence.

    Attributes:
        state: the SQLSTATE, empty where there is none.
        wrong_value: whether a value that was given is at fault.
    """

    def __init__(self, sentence: str, state: str) -> None:
        super().__init__(sentence)
        self.state = state
        self.wrong_value = state.startswith("22")


@contextmanager
def refusals() -> Iterator[None]:
    """Turn the driver's errors into Refused; details are left out, for they hold whole rows."""
    try:
        yield
    except asyncpg.PostgresError as error:
        message = (error.message or type(error).__name__).rstrip(".")
        if error.sqlstate == "42501":
            message = f"The database does not allow it ({message}): use a role that may"
        raise Refused(f"{message[:1].upper()}{message[1:]}.", error.sqlstate or "") from None
    except asyncpg.ClientConfigurationError as error:
        # Its hints are about asyncpg, not about what a person can set.
        raise Refused(f"DATABASE_URL cannot be used ({_first_line(error)}).", "") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
