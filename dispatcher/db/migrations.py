"""The schema: what it is, what it should be, and the SQL between the two."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from dispatcher.db.pool import DatabaseLost, connect

LOCK: Final = 0x64697370  # any number of our own: those who migrate at once take turns
TIMEOUT: Final = 3600.0
"""Seconds that a migration may take."""


@dataclass(frozen=True, slots=True)
class Schema:
    """Which revision the database is at, None for none, and which this program needs."""

    found: str | None
    wanted: str
    known: bool

    @property
    def current(self) -> bool:
        """Whether the database is as this program needs it."""
        return self.found == self.wanted

    @property
    def complaint(self) -> str:
        """One sentence on what is wrong and what to do."""
        if self.known:
            return (
                f"The database is at revision {self.found or 'none'} and this program needs "
                f"{self.wanted}; run 'dispatcher migrate'."
            )
        return (
            f"The database is at revision {self.found}, which this program does not know; "
            "run a newer dispatcher."
        )


def _config(out: io.StringIO) -> Config:
    here = Path(__file__).resolve().parent.parent
    inside, beside = here / "migrations", here.parent / "migrations"
    config = Config(output_buffer=out)
    config.set_main_option("script_location", str(inside if inside.is_dir() else beside))
    config.set_main_option("path_separator", "os")
    return config


def render(found: str | None = None) -> str:
    """The SQL from a revision (None: an empty database) to the one this program needs."""
    out = io.StringIO()
    command.upgrade(_config(out), f"{found or 'base'}:head", sql=True)
    return out.getvalue()


# Tell the revision that the database is at.
_FOUND = "SELECT version_num FROM alembic_version"


async def inspect(connection: asyncpg.Connection) -> Schema:
    """Compare the database's schema with the one this program needs."""
    scripts = ScriptDirectory.from_config(_config(io.StringIO()))
    wanted = scripts.get_current_head() or ""
    try:
        found = await connection.fetchval(_FOUND)
    except asyncpg.UndefinedTableError:
        found = None
    known = found is None or found in {script.revision for script in scripts.walk_revisions()}
    return Schema(found, wanted, known)


class SchemaAhead(Exception):
    """The database is at a revision that this program does not know."""


async def upgrade(dsn: str) -> Schema:
    """Bring a database to the schema of this program; those who do so at once take turns.

    Returns what was found. Raises DatabaseLost and SchemaAhead.
    """
    connection = await connect(dsn, name="dispatcher migrate", timeout=TIMEOUT)
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
        schema = await inspect(connection)
        if not schema.known:
            raise SchemaAhead(schema.complaint)
        if not schema.current:
            await connection.execute(render(schema.found))
    except (OSError, TimeoutError, asyncpg.PostgresConnectionError) as error:
        raise DatabaseLost(str(error)) from None
    finally:
        await connection.close()
    return schema
