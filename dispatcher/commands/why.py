"""The command `dispatcher why`."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer
from rich.text import Text

from dispatcher.commands.database import use
from dispatcher.commands.failures import Failed
from dispatcher.commands.moments import lasting, local
from dispatcher.commands.terminal import console, many, print_json, printable, table
from dispatcher.db.outbox import RETRIES_OF_UNKNOWN
from dispatcher.db.story import AHEAD, Story, story
from dispatcher.domain.message import Status
from dispatcher.domain.msisdn import masked
from dispatcher.settings import load

SLACK = timedelta(seconds=1)
"""A wait for its turn that is not worth a word."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Something that keeps a waiting message from going."""

    reason: str
    """One sentence."""
    until: datetime | None
    """When it ends by itself; None if somebody has to end it."""


def why(
    message_id: Annotated[int, typer.Argument(metavar="ID", min=0, max=2**63 - 1)],
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell the whole story of one message, and what a waiting one waits for.

    For example:

    \b
    dispatcher why 1017
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    settings = load()
    found = use(settings, lambda session: story(session, message_id, settings.dlr_status_param))
    if found is None:
        raise Failed(f"There is no message {message_id}; it may have been pruned.")
    message = {**found.message, "msisdn": masked(found.message["msisdn"])}
    waits = message["status"] == Status.PENDING
    reasons = list(holds(found)) if waits else []
    earliest = earliest_of(reasons, message["now"]) if waits else None
    if json:
        print_json(
            {
                **message,
                "requests": [dict(row) for row in found.attempts],
                "reports": [dict(row) for row in found.reports],
                "holds": [asdict(reason) for reason in reasons],
                "earliest": earliest,
                "advice": advice(message),
            }
        )
        return
    _show(message, found, reasons, earliest)


def holds(found: Story) -> Iterator[Hold]:
    """What keeps a waiting message from going, as far as the database knows."""
    message, now = found.message, found.message["now"]
    service = message["service_id"]
    if message["expires_at"] is not None and message["expires_at"] <= now:
        yield Hold(
            "Its expires_at has passed; it goes no more"
            + (", and will be in doubt again." if message["doubts"] else " and will be expired."),
            None,
        )
    if message["send_after"] > now:
        yield Hold("It is not to go before its send_after.", message["send_after"])
    if message["retry_at"] is not None and message["retry_at"] > now:
        yield Hold("It waits after a request that failed.", message["retry_at"])
    if message["paused"]:
        yield Hold(
            f"Service {service} is paused; 'dispatcher service resume {service}' ends that.", None
        )
    if message["blocked_until"] is not None:
        yield Hold(
            f"Service {service} is blocked ({message['blocked_reason']}); then one message tries.",
            message["blocked_until"],
        )
    yield from _no_way(found)
    yield from _no_quota(found)
    if found.ahead:
        yield from _turn(found)


def _no_way(found: Story) -> Iterator[Hold]:
    ways = [way for way in found.ways if way["workers"]]
    if not ways:
        yield Hold("No worker is alive; start one with 'dispatcher run'.", None)
        return
    closed: list[Hold] = []
    for way in ways:
        untils = {
            "is banned by the provider": way["banned_until"],
            "waits, for the provider is ill": way["ill_until"],
            f"may not use the service ({way['blocked_reason']})": way["blocked_until"],
        }
        ends = {reason: until for reason, until in untils.items() if until is not None}
        if not ends:
            return
        reason, until = max(ends.items(), key=lambda end: end[1])
        closed.append(Hold(f"Egress {way['name']} {reason}; then one message tries.", until))
    yield min(closed, key=lambda hold: hold.until or found.message["now"])


def _no_quota(found: Story) -> Iterator[Hold]:
    for window in found.windows:
        period, limit = window["period"], window["limit"]
        if window["closed_until"] is not None:
            yield Hold(
                f"The provider says that the limit of the {period} is used up.",
                window["closed_until"],
            )
        elif limit is not None and window["used"] >= limit:
            yield Hold(
                f"The limit of the {period} is used up ({window['used']} of {limit}).",
                window["next_window"],
            )
        elif limit is not None and window["used"] + found.ahead >= limit:
            yield Hold(
                f"The messages before it use up what is left of the {period} "
                f"({limit - window['used']}).",
                window["next_window"],
            )


def _turn(found: Story) -> Iterator[Hold]:
    message = found.message
    count = f"{AHEAD} or more" if found.ahead == AHEAD else str(found.ahead)
    until = max(message["now"], message["next_slot"] or message["now"])
    with suppress(OverflowError):  # a delay that outlasts the calendar has no such time
        until += found.ahead * message["delay"]
    if until > message["now"] + SLACK:
        pace = lasting(message["delay"])
        yield Hold(f"Before it go {count} of its service, one each {pace}.", until)
    else:
        yield Hold(f"Before it go {count} of its service.", message["now"])


def earliest_of(reasons: list[Hold], now: datetime) -> datetime | None:
    """The earliest time a waiting message can go; None if somebody has to act first."""
    untils = [now]
    for reason in reasons:
        if reason.until is None:
            return None
        untils.append(reason.until)
    return max(untils)


def advice(message: dict[str, Any]) -> str | None:
    """What the status of a message means and what can be done, in one sentence."""
    number = message["id"]
    match message["status"]:
        case Status.SENDING if message["worker_lease_until"] is None or (
            message["worker_lease_until"] <= message["now"]
        ):
            return "Its worker is silent; another one sees to it soon."
        case Status.SENDING:
            return f"Worker {message['worker_id']} has it; a request may have left."
        case Status.UNKNOWN if (
            message["on_unknown"] == "retry" and message["doubts"] < RETRIES_OF_UNKNOWN
        ):
            return "It may have been sent; its service wants it sent again, soon."
        case Status.UNKNOWN:
            return (
                f"It may have been sent: 'dispatcher resolve --id {number}' with --sent if it "
                "was, with --resend if not."
            )
        case Status.REJECTED | Status.EXPIRED:
            return f"'dispatcher retry --id {number}' sends it again, once it is put right."
        case Status.ACCEPTED if message["extended"]:
            return "The provider has it; what became of it is not reported yet."
        case Status.ACCEPTED:
            return "The provider has it; no delivery reports were asked for."
    return None


def _show(
    message: dict[str, Any], found: Story, reasons: list[Hold], earliest: datetime | None
) -> None:
    out = console()
    status = "in doubt" if message["status"] == Status.UNKNOWN else message["status"]
    since = lasting(message["now"] - message["status_at"])
    out.print(Text(f"Message {message['id']} is {status} (for {since}).\n"))
    for name, value in _facts(message):
        out.print(Text(f"{name:<12}{value}"))
    if found.attempts:
        shown = table("request at", "took", "worker", "outcome", "answer", right=("took",))
        for row in found.attempts:
            shown.add_row(
                local(row["sent_at"]),
                lasting(row["seconds"]),
                str(row["worker_id"]),
                row["outcome"],
                printable(row["reply"] or row["error"] or ""),
            )
        out.print("", shown)
    if found.reports:
        shown = table("report at", "status", "provider's word")
        for row in found.reports:
            shown.add_row(
                local(row["received_at"]),
                row["status"] or "not known",
                printable(row["word"] or ""),
            )
        out.print("", shown)
    if message["status"] == Status.PENDING:
        _show_holds(reasons, earliest, message)
    told = advice(message)
    if told:
        out.print(Text(f"\n{told}"))


def _facts(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "service", printable(f"{message['service_id']} {message['service_name']}".strip())
    yield "to", f"{message['msisdn']}, {many(message['characters'], 'character')}"
    yield "created", local(message["created_at"])
    for name in ("send_after", "expires_at", "accepted_at"):
        if message[name] is not None and message[name] != message["created_at"]:
            yield name, local(message[name])
    for name in ("batch", "dedup_key", "reply", "provider_id", "error"):
        if message[name] is not None:
            yield name, printable(message[name])
    if message["priority"]:
        yield "priority", str(message["priority"])
    yield "attempts", str(message["attempts"])


def _show_holds(reasons: list[Hold], earliest: datetime | None, message: dict[str, Any]) -> None:
    out = console()
    out.print()
    for reason in reasons:
        out.print(Text(f"- {printable(reason.reason)}"))
        if reason.until is not None and reason.until > message["now"]:
            out.print(Text(f"  Until {local(reason.until)}."))
    if not reasons:
        out.print("Nothing holds it; it goes with the next claim.")
    elif earliest is None:
        out.print("It does not go before somebody acts.")
    else:
        out.print(Text(f"It goes at {local(earliest)} at the earliest."))
    if earliest and message["expires_at"] and message["expires_at"] <= earliest:
        out.print("It expires before that.")
