"""The documents and the schema name the same columns."""

import re
from pathlib import Path
from typing import TypeAlias

import asyncpg

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

ROOT = Path(__file__).parents[2]


def shown(document: str, begin: str, end: str) -> set[str]:
    """The columns in the first cells of the tables between two places of a document."""
    text = (ROOT / document).read_text("utf-8").partition(begin)[2].partition(end)[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


async def columns(connection: Connection, table: str) -> set[str]:
    """The columns of a table."""
    rows = await connection.fetch(
        "SELECT column_name FROM information_schema.columns WHERE table_name = $1", table
    )
    return {row["column_name"] for row in rows}


async def test_configuration_explains_each_column_of_a_service(connection: Connection) -> None:
    """The table of a service's columns is whole."""
    told = shown("docs/configuration.md", "## Services", "## The provider")
    assert told == await columns(connection, "service")


async def test_readme_and_roles_name_the_columns_of_users(connection: Connection) -> None:
    """The columns that the README lets users write are those that a producer may."""
    told = shown("README.md", "The columns that you may write", "The rest is written")
    await connection.execute((ROOT / "deploy/roles.sql").read_text())
    rows = await connection.fetch(
        "SELECT column_name FROM information_schema.column_privileges"
        " WHERE table_name = 'outbox' AND grantee = 'dispatcher_producer'"
        " AND privilege_type = 'INSERT'"
    )
    assert told == {row["column_name"] for row in rows}
    assert told < await columns(connection, "outbox")
