"""Whether the database has the schema of this program.

Alembic, which is slow to load, is only loaded where it has not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import asyncpg

from dispatcher.db.pool import Session

if TYPE_CHECKING:
    from dispatcher.db import migrations


class SchemaWrong(Exception):
    """The schema is behind or ahead of this program; the text is one sentence."""


# Tell the revision that the database is at.
_FOUND: Final = "SELECT version_num FROM alembic_version"


def newest() -> str:
    """The newest revision, by the number with which its file's name begins."""
    here = Path(__file__).resolve().parent.parent
    inside, beside = here / "migrations", here.parent / "migrations"
    versions = (inside if inside.is_dir() else beside) / "versions"
    return max(path.name.partition("_")[0] for path in versions.glob("[0-9]*.py"))


async def complaint(session: Session) -> str | None:
    """One sentence on what is wrong with the schema, None if nothing is. Raises DatabaseLost."""
    try:
        rows = await session.fetch(_FOUND)
    except asyncpg.UndefinedTableError:
        rows = []
    if rows and rows[0]["version_num"] == newest():
        return None
    schema = await inspect(session)
    return None if schema.current else schema.complaint


async def upgrade(dsn: str) -> migrations.Schema:
    """Bring a database to this program's schema; returns what was found.

    Raises DatabaseLost and SchemaWrong.
    """
    from dispatcher.db import migrations

    try:
        return await migrations.upgrade(dsn)
    except migrations.SchemaAhead as error:
        raise SchemaWrong(str(error)) from None


async def inspect(session: Session) -> migrations.Schema:
    """Compare the database's schema with this program's. Raises DatabaseLost."""
    from dispatcher.db import migrations

    async with session.transaction() as connection:
        return await migrations.inspect(connection)
