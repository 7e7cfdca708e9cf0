"""The command `dispatcher migrate`."""

import asyncio
from typing import Annotated

import typer

from dispatcher.commands.database import PATIENCE, located
from dispatcher.commands.failures import Misused
from dispatcher.commands.terminal import print_json
from dispatcher.db.migrations import Schema, render
from dispatcher.db.pool import Session
from dispatcher.db.refusal import refusals
from dispatcher.db.schema import inspect, upgrade
from dispatcher.settings import load


def migrate(
    *,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL for an empty database; run nothing.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Tell whether the schema is current; exit code 1 if not."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bring the database's schema to what this version needs.

    Safe to run again, and by many at once: they take turns.

    For example:

    \b
    dispatcher migrate --check || dispatcher migrate
    dispatcher migrate --sql > schema.sql
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    if sql and check:
        raise Misused("Use --sql or --check, not both.")
    if sql:
        written = render()
        if json:
            print_json({"sql": written})
        else:
            typer.echo(written, nl=False)
        return

    with located(load()) as dsn, refusals():
        if check:
            schema = asyncio.run(_inspect(dsn, PATIENCE))
            sentence = (
                f"The database is at revision {schema.found}, as this program needs it."
                if schema.current
                else schema.complaint
            )
        else:
            schema = asyncio.run(upgrade(dsn))
            sentence = (
                f"The database was at revision {schema.found} already."
                if schema.current
                else f"The database went from revision {schema.found or 'none'} to {schema.wanted}."
            )
    if json:
        print_json(
            {
                "found": schema.found,
                "wanted": schema.wanted,
                "current": schema.current,
                "migrated": not (check or schema.current),
            }
        )
    else:
        typer.echo(sentence, err=check and not schema.current)
    if check and not schema.current:
        raise typer.Exit(1)


async def _inspect(dsn: str, patience: float) -> Schema:
    async with Session(dsn, name="dispatcher migrate", timeout=patience) as session:
        return await inspect(session)
