"""The command line: which commands there are, and how each way to fail ends.

A command's module is loaded when the command is used, so that none waits for what another needs.
"""

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from dispatcher import __version__


class _Command(NamedTuple):
    place: str
    """Its module and its name there."""
    help: str


_COMMANDS = {
    name: _Command(f"dispatcher.{place}", told)
    for name, place, told in (
        ("migrate", "commands.migrate:migrate", "Bring the database's schema up to date."),
        ("run", "commands.run:run", "Send what is in the outbox, until stopped."),
        ("demo", "demo:demo", "Watch 2,000 messages go through, in half a minute."),
        ("simulator", "simulator.command:simulator", "Play the provider, to try things out."),
        ("check", "commands.check:check", "Check settings, database, provider; send nothing."),
        ("service", "commands.service:app", "Add, change, list, pause and resume services."),
        ("enqueue", "commands.enqueue:enqueue", "Put a message, or a CSV file, into the outbox."),
        ("status", "commands.status:status", "Show how all stands, once or as a live screen."),
        ("why", "commands.why:why", "Tell one message's story, and what it waits for."),
        ("export", "commands.export:export", "Write a batch as CSV, with what became of it."),
        ("retry", "commands.repair:retry", "Send again what was rejected or expired."),
        ("cancel", "commands.repair:cancel", "Never send what has not left yet."),
        ("resolve", "commands.repair:resolve", "List what is in doubt, or settle it."),
        ("prune", "commands.prune:prune", "Remove what is finished and old."),
    )
}


def _load(command: str) -> Any:
    module, _, name = _COMMANDS[command].place.partition(":")
    found = getattr(import_module(module), name)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(command)(found)
    return typer.main.get_command(single)


class _Commands(TyperGroup):
    """The commands, loaded when asked for; known errors end in a sentence and an exit code."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - as Typer calls it
        if cmd_name in _COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - as Typer calls it
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in _COMMANDS.items()])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            known = import_module("dispatcher.commands.failures").told(error)
            if known is None:
                raise
            typer.echo(known.sentence, err=True)
            raise typer.Exit(known.code) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dispatcher {__version__}")
        raise typer.Exit


@app.callback()
def dispatcher(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Send the rows of a PostgreSQL outbox as SMS, never twice and never lost.

    Settings come from the environment and from a file .env: DATABASE_URL and
    DISPATCHER_…; without DATABASE_URL an embedded PostgreSQL is used.
    """
