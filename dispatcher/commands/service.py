"""The commands `dispatcher service …`."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from dispatcher.commands.database import use
from dispatcher.commands.failures import Failed, Misused
from dispatcher.commands.moments import lasting, seconds
from dispatcher.commands.terminal import console, print_json, printable, table
from dispatcher.db import register
from dispatcher.db.pool import Session
from dispatcher.db.register import Changes
from dispatcher.settings import load

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Add, change, list, pause and resume the provider's services.",
)

_Id = Annotated[
    int,
    typer.Argument(metavar="ID", min=0, max=2**63 - 1, help="The provider's service_id."),
]
_user = typer.Option(metavar="N", min=0, max=2**63 - 1, help="The customer's user_id.")
_Name = Annotated[str | None, typer.Option(metavar="TEXT", help="A name for people.")]
_DayLimit = Annotated[str | None, typer.Option(metavar="N", help="Most messages a day.")]
_WeekLimit = Annotated[str | None, typer.Option(metavar="N", help="Most messages a week.")]
_MonthLimit = Annotated[str | None, typer.Option(metavar="N", help="Most messages a month.")]
_MinDelay = Annotated[
    str | None,
    typer.Option(metavar="SECONDS", help="Least time between two messages; also 50ms."),
]
_Timezone = Annotated[
    str | None,
    typer.Option(metavar="ZONE", help="Where its days begin, such as Europe/Sofia."),
]
_Pattern = Annotated[
    list[str] | None,
    typer.Option(metavar="RE", help="What a text must match whole; may be repeated."),
]
_OnUnknown = Annotated[
    str | None,
    typer.Option(metavar="hold|retry", help="What becomes of a message in doubt."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def add(  # noqa: PLR0913 - each option of the command is an argument
    service_id: _Id,
    *,
    user_id: Annotated[int, _user],
    name: _Name = None,
    day_limit: _DayLimit = None,
    week_limit: _WeekLimit = None,
    month_limit: _MonthLimit = None,
    min_delay: _MinDelay = None,
    timezone: _Timezone = None,
    pattern: _Pattern = None,
    on_unknown: _OnUnknown = None,
    json: _Json = False,
) -> None:
    """Add a service.

    For example:

    \b
    dispatcher service add 42 --user-id 7 --day-limit 1000 --min-delay 0.05
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    given = _changes(
        user_id=user_id,
        name=name,
        day_limit=day_limit,
        week_limit=week_limit,
        month_limit=month_limit,
        min_delay=min_delay,
        timezone=timezone,
        pattern=pattern,
        on_unknown=on_unknown,
    )
    if not _done(lambda session: register.add(session, service_id, given)):
        raise Failed(
            f"Service {service_id} exists already; "
            f"change it with 'dispatcher service set {service_id}'."
        )
    _tell(f"Service {service_id} is added.", service_id, as_json=json)


@app.command(name="set")
def set_(  # noqa: PLR0913 - each option of the command is an argument
    service_id: _Id,
    *,
    user_id: Annotated[int | None, _user] = None,
    name: _Name = None,
    day_limit: _DayLimit = None,
    week_limit: _WeekLimit = None,
    month_limit: _MonthLimit = None,
    min_delay: _MinDelay = None,
    timezone: _Timezone = None,
    pattern: _Pattern = None,
    on_unknown: _OnUnknown = None,
    json: _Json = False,
) -> None:
    """Change a service: what is given, and nothing else; 'none' clears.

    For example:

    \b
    dispatcher service set 42 --day-limit none --pattern 'Invoice [0-9]+ is due'
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    given = _changes(
        user_id=user_id,
        name=name,
        day_limit=day_limit,
        week_limit=week_limit,
        month_limit=month_limit,
        min_delay=min_delay,
        timezone=timezone,
        pattern=pattern,
        on_unknown=on_unknown,
    )
    if not given:
        raise Misused("Say what to change, such as --day-limit 1000.")
    _must_exist(_done(lambda session: register.change(session, service_id, given)), service_id)
    _tell(f"Service {service_id} is changed.", service_id, as_json=json)


@app.command()
def pause(service_id: _Id, *, json: _Json = False) -> None:
    """Send nothing more through a service until it is resumed.

    For example:

    \b
    dispatcher service pause 42
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    _must_exist(_done(lambda session: register.pause(session, service_id)), service_id)
    _tell(f"Service {service_id} is paused.", service_id, as_json=json)


@app.command()
def resume(service_id: _Id, *, json: _Json = False) -> None:
    """Send again: lifts the pause, the blocks, and what LIMIT_… closed.

    For example:

    \b
    dispatcher service resume 42
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    _must_exist(_done(lambda session: register.resume(session, service_id)), service_id)
    _tell(f"Service {service_id} may send.", service_id, as_json=json)


@app.command(name="list")
def list_(*, json: _Json = False) -> None:
    """List the services.

    For example:

    \b
    dispatcher service list
    dispatcher service list --json | jq '.[] | select(.paused) | .service_id'
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    rows = [dict(row) for row in _done(register.listed)]
    if json:
        print_json(rows)
        return
    if not rows:
        typer.echo("There is no service yet; see 'dispatcher service add --help'.")
        return
    shown = table("id", "name", "user", "limits", "zone", "state", right=("id", "user"))
    shown.columns[1].max_width = 18
    for row in rows:
        periods = ("day", "week", "month")
        limits = [f"{row[f'{p}_limit']} a {p}" for p in periods if row[f"{p}_limit"] is not None]
        if row["min_delay"]:
            limits.append(f"{lasting(row['min_delay'])} apart")
        shown.add_row(
            str(row["service_id"]),
            printable(row["name"]),
            str(row["user_id"]),
            "\n".join(limits) or "none",
            row["timezone"],
            _state(row),
        )
    console().print(shown)


def _state(row: dict[str, Any]) -> str:
    states = []
    if row["paused"]:
        states.append("paused")
    if row["blocked_until"]:
        states.append(f"blocked:\n{row['blocked_reason']}")
    if row["blocked_egresses"]:
        states.append(f"blocked at {', '.join(row['blocked_egresses'])}")
    return "\n".join(states) or "may send"


def _changes(*, pattern: list[str] | None, **given: str | int | None) -> Changes:
    """The columns that were given; 'none' clears. Raises Misused."""
    changes: dict[str, object] = {}
    for column, value in given.items():
        if value is not None:
            changes[column] = _read(column, value)
    if pattern is not None:
        changes["patterns"] = None if pattern == ["none"] else pattern
    return changes  # type: ignore[return-value]  # its keys are the columns of Changes


def _read(column: str, value: str | int) -> object:
    option = f"--{column.replace('_', '-')}"
    none = value == "none"
    match column:
        case "day_limit" | "week_limit" | "month_limit":
            if none:
                return None
            written = str(value)
            if not (written.isascii() and written.isdigit() and int(written) < 2**31):
                raise Misused(f"{option} must be a whole number, or 'none'.")
            return int(written)
        case "min_delay":
            try:
                return seconds("0" if none else str(value))
            except ValueError as error:
                raise Misused(f"{option} is wrong: {error}.") from None
        case "on_unknown":
            if not none and value not in {"hold", "retry"}:
                raise Misused(f"{option} must be hold or retry.")
            return "hold" if none else value
        case "timezone":
            return "Europe/Sofia" if none else value
        case "name":
            return "" if none else value
        case _:
            return value


def _done(work: Callable[[Session], Awaitable[T]]) -> T:
    return use(load(), work)


def _must_exist(found: object, service_id: int) -> None:
    if not found:
        raise Failed(f"There is no service {service_id}; see 'dispatcher service list'.")


def _tell(sentence: str, service_id: int, *, as_json: bool) -> None:
    if as_json:
        print_json({"service_id": service_id})
    else:
        typer.echo(sentence)
