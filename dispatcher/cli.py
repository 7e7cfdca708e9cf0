"""The command line: which commands there are, and how each way to fail ends.

A command's module is loaded when the command is used, so that none waits for what another needs.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dispatcher import __version__

_COMMANDS = {
    "migrate": "dispatcher.commands.migrate:migrate",
    "run": "dispatcher.commands.run:run",
    "demo": "dispatcher.demo:demo",
    "simulator": "dispatcher.simulator.command:simulator",
    "check": "dispatcher.commands.check:check",
    "service": "dispatcher.commands.service:app",
    "enqueue": "dispatcher.commands.enqueue:enqueue",
    "status": "dispatcher.commands.status:status",
    "why": "dispatcher.commands.why:why",
    "export": "dispatcher.commands.export:export",
    "retry": "dispatcher.commands.repair:retry",
    "cancel": "dispatcher.commands.repair:cancel",
    "resolve": "dispatcher.commands.repair:resolve",
    "prune": "dispatcher.commands.prune:prune",
}


def _load(command: str) -> Any:
    module, _, name = _COMMANDS[command].partition(":")
    found = getattr(import_module(module), name)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(command)(found)
    return typer.main.get_command(single)


class _Commands(TyperGroup):
    """The commands, loaded when asked for; known errors end in a sentence and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - as Typer calls it
        return [name for name, place in _COMMANDS.items() if find_spec(place.partition(":")[0])]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - as Typer calls it
        if cmd_name in _COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands.get(cmd_name)

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
