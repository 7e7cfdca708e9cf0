"""The command `dispatcher prune`."""

from datetime import timedelta
from typing import Annotated

import typer

from dispatcher.commands.database import use
from dispatcher.commands.failures import Misused
from dispatcher.commands.moments import span
from dispatcher.commands.terminal import bars, many, print_json
from dispatcher.db.pool import Session
from dispatcher.db.prune import Pruned
from dispatcher.db.prune import prune as steps
from dispatcher.settings import load

PATIENCE = 300.0
"""Seconds that one step may take."""


def prune(
    *,
    older_than: Annotated[
        str, typer.Option(metavar="SPAN", help="Finished for longer than this, such as 90d.")
    ],
    keep_dedup: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Keep what has a dedup_key younger than this."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove what is finished and old: messages, attempts, reports, counts.

    What waits, is being sent or is in doubt stays. A key that is removed with its
    message can be used again.

    For example:

    \b
    dispatcher prune --older-than 90d --keep-dedup 365d
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    age = _span("--older-than", older_than)
    keep = None if keep_dedup is None else _span("--keep-dedup", keep_dedup)

    async def work(session: Session) -> Pruned:
        pruned = Pruned()
        with bars() as progress:
            bar = progress.add_task("pruning", total=1.0)
            async for pruned in steps(session, age, keep):
                progress.update(bar, completed=pruned.done)
        return pruned

    pruned = use(load(), work, patience=PATIENCE)
    if json:
        print_json(
            {
                "messages": pruned.messages,
                "kept_for_dedup_key": pruned.kept,
                "reports": pruned.reports,
                "quota_windows": pruned.windows,
                "workers": pruned.workers,
            }
        )
        return
    typer.echo(f"{many(pruned.messages, 'message')} removed.")
    if pruned.kept:
        typer.echo(f"{many(pruned.kept, 'message')} kept for their dedup_key.")


def _span(option: str, written: str) -> timedelta:
    try:
        return span(written)
    except ValueError as error:
        raise Misused(f"{option} is wrong: {error}.") from None
