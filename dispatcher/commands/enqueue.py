"""The command `dispatcher enqueue`."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from dispatcher.commands.database import use
from dispatcher.commands.failures import Failed, Misused
from dispatcher.commands.moments import moment
from dispatcher.commands.terminal import print_json
from dispatcher.db.enqueue import Enqueued, NewMessage, fits, now
from dispatcher.db.enqueue import enqueue as put
from dispatcher.db.pool import Session
from dispatcher.domain import msisdn as numbers
from dispatcher.settings import Settings, load

TEXT_LIMIT = 160
"""Characters (Unicode code points) of a text. Source: the provider's protocol."""


def enqueue(  # noqa: PLR0913 - each option of the command is an argument
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE.csv]",
            help="Messages, one a line, with columns named as in the table outbox.",
        ),
    ] = None,
    *,
    service: Annotated[
        int, typer.Option(metavar="ID", min=0, max=2**63 - 1, help="The service to send through.")
    ],
    msisdn: Annotated[str | None, typer.Option(metavar="NUMBER", help="To whom.")] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What; with a file, a template of its columns."),
    ] = None,
    priority: Annotated[
        int, typer.Option(metavar="N", min=-(2**15), max=2**15 - 1, help="Higher goes first.")
    ] = 0,
    send_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Not before; a time, or a span such as 2h.")
    ] = None,
    expires_at: Annotated[str | None, typer.Option(metavar="TIME", help="Not after.")] = None,
    dedup_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Refuse a second message with this key.")
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="LABEL", help="A label of your own.")] = None,
    extended: Annotated[bool, typer.Option(help="Ask for delivery reports.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put one message into the outbox, or a whole CSV file of them.

    A file is checked whole before its first message is written: all or nothing.

    For example:

    \b
    dispatcher enqueue --service 42 --msisdn 0881234567 --text 'Ready!'
    dispatcher enqueue people.csv --service 42 --batch may \\
        --text 'Invoice $number: $amount due'
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    if file is not None:
        raise Failed("not yet")
    if msisdn is None or text is None:
        raise Misused("Give --msisdn and --text, or a file.")
    settings = load()

    async def work(session: Session) -> Enqueued:
        time = await now(session)
        message = NewMessage(
            msisdn=msisdn,
            text=text,
            extended=extended,
            priority=priority,
            send_after=_time("--send-after", send_after, time),
            expires_at=_time("--expires-at", expires_at, time),
            dedup_key=dedup_key,
            batch=batch,
        )
        wrong = complaint(message, settings, time)
        if wrong is None and not await fits(session, service, text):
            wrong = "the text matches none of the service's patterns"
        if wrong is not None:
            raise Failed(f"Nothing is enqueued: {wrong}.")
        return await put(session, service, message)

    done = use(settings, work)
    if done.id is None:
        raise Failed(f"There is no service {service}; add it with 'dispatcher service add'.")
    if json:
        print_json({"id": done.id, "enqueued": done.new})
    elif done.new:
        typer.echo(done.id)
    if not done.new:
        raise Failed(f"Message {done.id} has the dedup_key {dedup_key!r}; nothing is enqueued.")


def _time(option: str, written: str | None, now: datetime) -> datetime | None:
    if written is None:
        return None
    try:
        return moment(written, now)
    except ValueError as error:
        raise Misused(f"{option} is wrong: {error}.") from None


def complaint(message: NewMessage, settings: Settings, now: datetime) -> str | None:
    """Why a message could never be sent, as a plain phrase; None if it can."""
    if numbers.normalise(message.msisdn, settings.region) is None:
        return "the number is not one that can be dialled"
    if not message.text:
        return "the text is empty"
    if len(message.text) > TEXT_LIMIT:
        return f"the text has {len(message.text)} characters, {TEXT_LIMIT} are the most"
    if message.expires_at is not None and message.expires_at <= max(now, message.send_after or now):
        return "it expires before it can be sent"
    return None
