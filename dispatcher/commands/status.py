"""The command `dispatcher status`."""

import asyncio
import time
from collections import defaultdict
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from dispatcher.commands.database import use
from dispatcher.commands.failures import Misused
from dispatcher.commands.moments import lasting, local
from dispatcher.commands.terminal import bar, console, many, print_json, printable, table
from dispatcher.db.overview import Overview, overview
from dispatcher.db.pool import DatabaseLost, Session
from dispatcher.domain.message import Status
from dispatcher.domain.msisdn import masked
from dispatcher.settings import load

EVERY = 1.0
"""Seconds between two looks of --watch, if a look costs less than a tenth of it."""

_EXACT = {Status.PENDING: "pending", Status.SENDING: "sending", Status.UNKNOWN: "in_doubt"}
"""Statuses that are counted by service, and under which name."""


def status(
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how all stands: the queue, quotas, bans, workers, what went wrong.

    For example:

    \b
    dispatcher status --watch
    dispatcher status --json | jq .oldest_due_age
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    if watch and json:
        raise Misused("Use --watch or --json, not both.")
    settings = load()
    if watch:
        try:
            use(settings, _watch)
        except KeyboardInterrupt:
            return
    found = document(use(settings, overview))
    if json:
        print_json(found)
    else:
        console().print(screen(found))


async def _watch(session: Session) -> None:
    """Show how all stands until interrupted; a look may cost a tenth of the time, no more."""
    shown = console()
    with Live(console=shown, screen=shown.is_terminal, auto_refresh=False) as live:
        while True:
            begun = time.monotonic()
            try:
                now: RenderableType = screen(document(await overview(session)))
            except DatabaseLost as error:
                now = Text(f"The database cannot be used ({error}); trying again.")
            live.update(now, refresh=True)
            if not shown.is_terminal:
                shown.print(now)
            await asyncio.sleep(max(EVERY, 10 * (time.monotonic() - begun)))


def document(found: Overview) -> dict[str, Any]:
    """How all stands, as `--json` prints it: ages in seconds, numbers masked, no texts."""
    counts = dict.fromkeys(Status, 0)
    for row in found.counts:
        counts[Status(row["status"])] = round(row["messages"] / found.share)
    for status_, name in _EXACT.items():
        counts[status_] = sum(row[name] for row in found.services)
    ages = [row["oldest_due_age"] for row in found.services if row["oldest_due_age"] is not None]
    return {
        "now": found.now,
        "counts": {status_.value: count for status_, count in counts.items()},
        "estimated": found.share < 1,
        "due": sum(row["due"] for row in found.services),
        "oldest_due_age": max(ages, default=None),
        "accepted_last_minute": round(sum(row["accepted"] for row in found.counts) / found.share),
        "in_doubt": counts[Status.UNKNOWN],
        "services": _services(found),
        "egresses": [dict(row) for row in found.egresses],
        "workers": [dict(row) for row in found.workers],
        "last_errors": [{**row, "msisdn": masked(row["msisdn"])} for row in found.errors],
    }


def _services(found: Overview) -> list[dict[str, Any]]:
    windows = defaultdict(list)
    for row in found.windows:
        limit, used = row["limit"], row["used"]
        left = None if limit is None else max(0, limit - used)
        windows[row["service_id"]].append(
            {
                "period": row["period"],
                "used": used,
                "limit": limit,
                "left": 0 if row["closed_until"] else left,
                "closed_until": row["closed_until"],
                "next_window": row["next_window"],
            }
        )
    blocked = defaultdict(list)
    for row in found.blocked_here:
        blocked[row["service_id"]].append(
            {
                "egress": row["egress"],
                "blocked_until": row["blocked_until"],
                "blocked_reason": row["blocked_reason"],
            }
        )
    return [
        {
            **row,
            "blocked_at": blocked[row["service_id"]],
            "quota": windows[row["service_id"]],
            "exhausted": any(window["left"] == 0 for window in windows[row["service_id"]]),
        }
        for row in found.services
    ]


def screen(found: dict[str, Any]) -> RenderableType:
    """How all stands, for people."""
    parts: list[RenderableType] = [_queue(found)]
    if found["services"]:
        parts.append(_service_table(found["services"]))
    else:
        parts.append("There is no service yet; see 'dispatcher service add --help'.\n")
    parts.extend(_egress_lines(found["egresses"]))
    parts.append(_worker_line(found["workers"], found["due"]))
    if found["in_doubt"]:
        parts.append(f"In doubt: {found['in_doubt']:,}; see 'dispatcher resolve'.")
    if found["last_errors"]:
        parts.append("")
        parts.append(_error_table(found["last_errors"], found["now"]))
    return Group(*parts)


def _queue(found: dict[str, Any]) -> RenderableType:
    about = "about " if found["estimated"] else ""
    counts = [
        f"{'in doubt' if name == 'unknown' else name} {'' if name in _EXACT else about}{count:,}"
        for name, count in found["counts"].items()
        if count
    ]
    due = f"{found['due']:,} due"
    if found["oldest_due_age"] is not None:
        due += f", the oldest for {lasting(found['oldest_due_age'])}"
    minute = found["accepted_last_minute"]
    return Text(
        f"{local(found['now'])}\n"
        f"{' · '.join(counts) or 'The outbox is empty.'}\n"
        f"{due} · {about}{minute:,} accepted in the last minute ({minute / 60:.1f}/s)\n"
    )


def _service_table(services: list[dict[str, Any]]) -> RenderableType:
    shown = table("service", "waiting", "sending", "doubt", "quota", right=_COUNTED)
    shown.columns[0].max_width = 22
    for service in services:
        windows = [w for w in service["quota"] if w["limit"] is not None or w["closed_until"]]
        quota = Text(
            "\n".join(_window(window) for window in windows)
            or f"{service['quota'][0]['used']:,} today, no limit"
        )
        name = f"{service['service_id']} {printable(service['name'])}".strip()
        shown.add_row(
            Text(f"{name}\n{_state(service)}"),
            f"{service['pending']:,}",
            f"{service['sending']:,}",
            f"{service['in_doubt']:,}",
            quota,
        )
    return shown


_COUNTED = ("waiting", "sending", "doubt")


def _window(window: dict[str, Any]) -> str:
    until = (window["closed_until"] or window["next_window"]).astimezone()
    used, limit = window["used"], window["limit"]
    share = 1.0 if window["closed_until"] or not limit else used / limit
    period = window["period"]
    told = f"closed this {period}" if window["closed_until"] else f"{used:,}/{limit:,} a {period}"
    return f"{bar(share)} {told}\n  then {until:%a %d %b %H:%M}"


def _state(service: dict[str, Any]) -> str:
    if service["paused"]:
        return "paused"
    if service["blocked_until"]:
        return f"blocked: {service['blocked_reason']}"
    if service["blocked_at"]:
        return "\n".join(
            f"blocked at {b['egress']}: {b['blocked_reason']}" for b in service["blocked_at"]
        )
    return "quota spent" if service["exhausted"] else "may send"


def _egress_lines(egresses: list[dict[str, Any]]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for egress in egresses:
        for until, what in (
            (egress["banned_until"], "is banned by the provider"),
            (egress["ill_until"], "waits, for the provider is ill"),
        ):
            if until:
                lines.append(
                    f"Egress {printable(egress['name'])} {what}; next probe {local(until)}."
                )
    return lines


def _worker_line(workers: list[dict[str, Any]], due: int) -> str:
    if workers:
        return f"{many(len(workers), 'worker')} alive: " + ", ".join(
            f"{worker['id']} at {printable(worker['host'])}" for worker in workers
        )
    return "No worker is alive" + ("; start one with 'dispatcher run'." if due else ".")


def _error_table(errors: list[dict[str, Any]], now: datetime) -> RenderableType:
    shown = table("last errors", "to", "status", "ago", "error", right=("last errors",))
    for error in errors:
        shown.add_row(
            str(error["id"]),
            printable(error["msisdn"]),
            error["status"],
            lasting(max(0.0, (now - error["status_at"]).total_seconds())),
            printable(error["error"]),
        )
    return shown
