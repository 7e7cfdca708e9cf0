"""What a command shows: tables that fit 80 columns, and JSON."""

import json
import textwrap
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from dispatcher.commands.moments import infinity

WIDTH = 80


def print_json(document: object) -> None:
    """Print one JSON document: times in ISO 8601 UTC, durations in seconds."""
    typer.echo(json.dumps(document, ensure_ascii=False, indent=2, default=_plain))


def _plain(value: object) -> object:
    match value:
        case datetime():
            return utc(value)
        case timedelta():
            return value.total_seconds()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def utc(time: datetime) -> str:
    """A time in ISO 8601, UTC; `infinity` or `-infinity` as PostgreSQL has them."""
    endless = infinity(time)
    if endless is not None:
        return endless
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def console() -> Console:
    """A console for tables, never wider than 80 columns."""
    found = Console(highlight=False, markup=False)
    found.width = min(found.width, WIDTH)
    return found


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def bars() -> Progress:
    """Progress bars on standard error, on a terminal only; to be entered."""
    errors = Console(stderr=True, highlight=False, markup=False)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )


def bar(share: float, width: int = 8) -> str:
    """A bar of block characters, filled by a share from 0 to 1; by nothing only at 0."""
    filled = min(width, max(int(share * width), int(share > 0)))
    return "█" * filled + "░" * (width - filled)


def many(count: int, noun: str) -> str:
    """A count and its noun: `1 message`, `2 messages`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def printable(text: str) -> str:
    """A text as it may be shown: what could move the cursor or colour the screen is replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def wrapped(text: str) -> str:
    """A text in lines of at most 80 columns."""
    return textwrap.fill(text, WIDTH, subsequent_indent="    ")
