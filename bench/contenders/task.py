"""The job that every contender gets: the same messages, to the same provider."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, NamedTuple, Self

USER: Final = 7
SERVICE: Final = 42
CONCURRENCY: Final = 100
"""Requests in flight at most; the dispatcher's default."""

FIRST_NUMBER: Final = 359_880_000_000


class Message(NamedTuple):
    """One SMS."""

    number: str
    text: str

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters of its request."""
        return {
            "user_id": str(USER),
            "service_id": str(SERVICE),
            "msisdn": self.number,
            "text": self.text,
            "extended": "yes",
        }


def message(index: int) -> Message:
    """The message with a number of its own, by which its request is known."""
    return Message(str(FIRST_NUMBER + index), f"Your invoice {index} is ready")


class Task(NamedTuple):
    """Where the messages are and where they go."""

    dsn: str
    url: str
    total: int

    @property
    def messages(self) -> Iterator[Message]:
        """All of them, in order."""
        return (message(index) for index in range(self.total))

    @property
    def environment(self) -> dict[str, str]:
        """The task for another process."""
        return {"BENCH_DSN": self.dsn, "BENCH_URL": self.url, "BENCH_TOTAL": str(self.total)}

    @classmethod
    def here(cls) -> Self:
        """The task that this process was given."""
        return cls(os.environ["BENCH_DSN"], os.environ["BENCH_URL"], int(os.environ["BENCH_TOTAL"]))
