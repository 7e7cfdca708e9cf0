"""The commands `dispatcher retry`, `cancel` and `resolve`."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Annotated

import typer

from dispatcher.commands.database import use
from dispatcher.commands.failures import Failed, Misused
from dispatcher.commands.moments import lasting, span
from dispatcher.commands.terminal import console, many, print_json, printable, table
from dispatcher.db.pool import Session
from dispatcher.db.repair import Action, Choice, act, choose, doubts, statuses_of
from dispatcher.domain.message import Status
from dispatcher.domain.msisdn import masked
from dispatcher.settings import load

NAMED = 20
"""Messages that are named when they could not be changed, and in the list of doubts."""

_HINT = " It may have been sent; see 'dispatcher resolve'."

_Ids = Annotated[
    list[int] | None,
    typer.Option("--id", metavar="N", help="One message; may be repeated."),
]
_Service = Annotated[
    int | None,
    typer.Option(metavar="ID", min=0, max=2**63 - 1, help="Messages of one service."),
]
_Batch = Annotated[str | None, typer.Option(metavar="LABEL", help="Messages of one batch.")]
_OlderThan = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="Messages in their status for longer, such as 2h."),
]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask first.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def retry(
    *,
    ids: _Ids = None,
    service: _Service = None,
    batch: _Batch = None,
    older_than: _OlderThan = None,
    yes: _Yes = False,
    json: _Json = False,
) -> None:
    """Send again what was rejected or expired, and at once what waits after a failure.

    For example:

    \b
    dispatcher retry --id 1017
    dispatcher retry --batch may --yes
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    choice = _choice(ids, service, batch, older_than)
    _Repair(Action.RETRY, choice, as_json=json).run(ask=not yes)


def cancel(
    *,
    ids: _Ids = None,
    service: _Service = None,
    batch: _Batch = None,
    older_than: _OlderThan = None,
    yes: _Yes = False,
    json: _Json = False,
) -> None:
    """Never send what waits, nor what is claimed and has not left yet.

    For example:

    \b
    dispatcher cancel --id 1017
    dispatcher cancel --batch may --yes
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    choice = _choice(ids, service, batch, older_than)
    _Repair(Action.CANCEL, choice, as_json=json).run(ask=not yes)


def resolve(
    *,
    sent: Annotated[bool, typer.Option("--sent", help="They were sent: mark them so.")] = False,
    resend: Annotated[
        bool, typer.Option("--resend", help="They were not sent: send them again.")
    ] = False,
    ids: _Ids = None,
    service: _Service = None,
    batch: _Batch = None,
    older_than: _OlderThan = None,
    yes: _Yes = False,
    json: _Json = False,
) -> None:
    """List what is in doubt, or settle it.

    A message is in doubt when its request may have reached the provider and no
    answer came. The provider's own list of what it sent tells which were.

    For example:

    \b
    dispatcher resolve
    dispatcher resolve --sent --id 1017 --id 1019
    dispatcher resolve --resend --service 42 --older-than 2h
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    if sent and resend:
        raise Misused("Use --sent or --resend, not both.")
    choice = _choice(ids, service, batch, older_than)
    if sent or resend:
        action = Action.MARK_SENT if sent else Action.SEND_AGAIN
        _Repair(action, choice, as_json=json).run(ask=not yes)
    else:
        _list(choice, as_json=json)


def _choice(
    ids: list[int] | None, service: int | None, batch: str | None, older_than: str | None
) -> Choice:
    try:
        age = None if older_than is None else span(older_than)
    except ValueError as error:
        raise Misused(f"--older-than is wrong: {error}.") from None
    if any(not 0 <= number < 2**63 for number in ids or ()):
        raise Misused("--id is wrong: there are no such numbers.")
    return Choice(ids or None, service, batch, age)


def _list(choice: Choice, *, as_json: bool) -> None:
    rows = use(load(), lambda session: doubts(session, choice))
    if as_json:
        print_json([{**row, "msisdn": masked(row["msisdn"])} for row in rows])
        return
    if not rows:
        typer.echo("Nothing is in doubt.")
        return
    now = datetime.now(UTC)
    shown = table("message", "service", "to", "in doubt for", "why", right=("message", "service"))
    for row in rows[:NAMED]:
        held = f" Worker {row['held_by']} may still hold it." if row["held_by"] is not None else ""
        shown.add_row(
            str(row["id"]),
            str(row["service_id"]),
            printable(masked(row["msisdn"])),
            lasting(max(0.0, (now - row["status_at"]).total_seconds())),
            printable((row["error"] or "").removesuffix(_HINT)) + held,
        )
    console().print(shown)
    if len(rows) > NAMED:
        typer.echo(f"… and {len(rows) - NAMED} more; --json lists all.")
    typer.echo("Settle them with --sent (mark as sent) or --resend (send again).")


@dataclass(frozen=True, slots=True)
class _Refusal:
    id: int
    reason: str


@dataclass(slots=True)
class _Done:
    before: Counter[Status] = field(default_factory=Counter)
    """Messages that were changed, by their status before."""
    refused: int = 0
    named: list[_Refusal] = field(default_factory=list)

    def refuse(self, message_id: int, reason: str) -> None:
        self.refused += 1
        if len(self.named) < NAMED:
            self.named.append(_Refusal(message_id, reason))


class _Repair:
    """One action on the chosen messages: count, ask, do, tell."""

    def __init__(self, action: Action, choice: Choice, *, as_json: bool) -> None:
        self._action = action
        self._choice = choice
        self._as_json = as_json

    def run(self, *, ask: bool) -> None:
        if self._choice.everything:
            raise Misused("Say which: --id, --service, --batch or --older-than.")
        if ask and not sys.stdin.isatty():
            raise Misused("It asks before it changes anything: add --yes where nobody can answer.")
        done = use(load(), lambda session: self._run(session, ask=ask))
        if self._as_json:
            print_json(
                {
                    "changed": done.before.total(),
                    "before": done.before,
                    "refused": done.refused,
                    "reasons": [asdict(refusal) for refusal in done.named],
                }
            )
        else:
            for refusal in done.named:
                typer.echo(refusal.reason, err=True)
            if done.refused > len(done.named):
                typer.echo(f"… and {done.refused - len(done.named)} more", err=True)
            typer.echo(_told(self._action, done.before))
        if done.refused and not done.before:
            raise typer.Exit(1)

    async def _run(self, session: Session, *, ask: bool) -> _Done:
        done = _Done()
        chosen = await choose(session, self._action, self._choice)
        if chosen and ask and not typer.confirm(_question(self._action, chosen), err=True):
            raise Failed("Nothing is changed.")
        # What is on the way first: it is the most urgent to cancel.
        statuses = sorted(chosen, key=lambda status: status is not Status.SENDING)
        ids = [number for status in statuses for number in chosen[status]]
        seen: set[int] = set()
        async for step in act(session, self._action, ids):
            done.before.update(step.changed.values())
            for number, worker in step.held:
                done.refuse(
                    number,
                    f"Message {number} may still be held by worker {worker}; stop it, or wait "
                    "until its lease is over.",
                )
            for number in step.too_late:
                done.refuse(number, f"Message {number} has expired; give it a later expires_at.")
            if self._choice.ids is not None:
                seen.update(step.changed, step.too_late, (number for number, _ in step.held))
        missed = [number for number in self._choice.ids or () if number not in seen]
        found = await statuses_of(session, missed) if missed else {}
        for number in dict.fromkeys(missed):
            done.refuse(number, _why_not(self._action, number, found.get(number)))
        return done


def _why_not(action: Action, number: int, status: Status | None) -> str:
    if status is None:
        return f"There is no message {number}."
    if status not in action.statuses:
        fit = " or ".join(status.value for status in action.statuses)
        return f"Message {number} is {status}, and would have to be {fit}."
    if action is Action.RETRY and status is Status.PENDING:
        return f"Message {number} waits for no retry; 'dispatcher why {number}' tells for what."
    return f"Message {number} does not fit the other options."


def _question(action: Action, chosen: dict[Status, list[int]]) -> str:
    total = sum(map(len, chosen.values()))
    of = ", ".join(f"{len(ids)} {status}" for status, ids in chosen.items())
    match action:
        case Action.MARK_SENT:
            return f"Mark {many(total, 'message')} in doubt as sent?"
        case Action.SEND_AGAIN:
            return (
                f"Send {many(total, 'message')} in doubt again? What the provider has sent "
                "already is then sent twice."
            )
        case Action.RETRY:
            return f"Send {many(total, 'message')} again ({of})?"
    return f"Cancel {many(total, 'message')} ({of})?"


def _told(action: Action, before: Counter[Status]) -> str:
    changed = before.total()
    if not changed:
        return "Nothing is changed."
    are = f"{many(changed, 'message')} {'is' if changed == 1 else 'are'}"
    match action:
        case Action.MARK_SENT:
            return f"{are} marked as sent."
        case Action.SEND_AGAIN | Action.RETRY:
            return f"{are} pending again."
    return "\n".join(_cancelled(before))


def _cancelled(before: Counter[Status]) -> Iterator[str]:
    waited, going, doubtful = (before[status] for status in Action.CANCEL.statuses)
    if waited:
        yield f"{many(waited, 'message')} cancelled."
    if going:
        yield f"{many(going, 'message')} on the way: cancelled too, if the request has not left."
    if doubtful:
        yield f"{many(doubtful, 'message')} in doubt: not sent again by the program itself."
