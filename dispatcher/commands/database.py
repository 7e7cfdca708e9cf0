"""The database that a command works on: the one set, or the embedded one."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dispatcher.db.pool import Session
from dispatcher.db.refusal import refusals
from dispatcher.db.schema import SchemaWrong, complaint, upgrade
from dispatcher.embedded import EmbeddedPostgres
from dispatcher.settings import Settings

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that one statement of an ordinary command may take."""


@contextmanager
def located(settings: Settings) -> Iterator[str]:
    """The connection string of the database, started if it is the embedded one.

    Raises EmbeddedUnavailable.
    """
    if settings.database_url is not None:
        yield settings.database_url
        return
    with EmbeddedPostgres(settings.data_dir) as server:
        yield server.dsn


async def what_is_wrong(session: Session, dsn: str, settings: Settings) -> str | None:
    """One sentence on what is wrong with the schema; one of our own is put right instead.

    Raises DatabaseLost and SchemaWrong.
    """
    wrong = await complaint(session)
    if wrong is None or settings.database_url is not None:
        return wrong
    await upgrade(dsn)
    return None


def use(
    settings: Settings, work: Callable[[Session], Awaitable[T]], *, patience: float = PATIENCE
) -> T:
    """Do a command's work on a session with the database; one of our own is migrated first.

    Raises DatabaseLost, Refused, SchemaWrong and EmbeddedUnavailable.
    """

    async def connected(dsn: str) -> T:
        async with Session(dsn, name="dispatcher command", timeout=patience) as session:
            wrong = await what_is_wrong(session, dsn, settings)
            if wrong is not None:
                raise SchemaWrong(wrong)
            return await work(session)

    with located(settings) as dsn, refusals():
        return asyncio.run(connected(dsn))
