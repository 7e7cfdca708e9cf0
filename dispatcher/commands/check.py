"""The command `dispatcher check`."""

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated
from urllib.parse import urlsplit

import typer

from dispatcher.commands.database import located, what_is_wrong
from dispatcher.commands.failures import told
from dispatcher.commands.moments import lasting
from dispatcher.commands.terminal import print_json, wrapped
from dispatcher.db.health import Health, look
from dispatcher.db.pool import DatabaseLost, Session
from dispatcher.db.refusal import Refused, refusals
from dispatcher.embedded import EmbeddedUnavailable
from dispatcher.settings import Settings, SettingsError, load, unknown

PATIENCE = 5.0
"""Seconds to wait for anything that is checked."""

CLOCKS_APART = 2.0
"""Seconds between the clocks that are worth a word."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


def check(*, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check settings, database, schema, clocks, provider and report endpoint.

    Sends nothing. Each line that fails says what to do; the exit code is then 1.

    For example:

    \b
    dispatcher check && dispatcher run
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    findings = []
    for finding in _findings():
        findings.append(finding)
        if not json:
            mark = "ok  " if finding.ok else "FAIL"
            typer.echo(wrapped(f"{mark} {finding.name}: {finding.detail}"))
            if finding.remedy is not None:
                typer.echo(wrapped(f"     -> {finding.remedy}"))
    ok = all(finding.ok for finding in findings)
    if json:
        print_json({"ok": ok, "checks": [asdict(finding) for finding in findings]})
    if not ok:
        raise typer.Exit(1)


def _findings() -> Iterator[Finding]:
    try:
        settings = load()
    except SettingsError as error:
        yield Finding("settings", ok=False, detail=str(error), remedy="Correct it and try again.")
        return
    names = unknown()
    yield Finding(
        "settings",
        ok=True,
        detail=f"all are right, but this is none: {', '.join(names)}" if names else "all are right",
        remedy="Correct the name, or take it out of the environment." if names else None,
    )
    health: Health | None = None
    try:
        with located(settings) as dsn, refusals():
            health, schema = asyncio.run(_ask(dsn, settings))
    except (DatabaseLost, EmbeddedUnavailable, Refused) as error:
        yield _database_away(error)
    else:
        yield from _database(health, schema, settings)
    yield _provider(settings)
    yield _http(settings, health)


async def _ask(dsn: str, settings: Settings) -> tuple[Health, str | None]:
    async with Session(dsn, name="dispatcher check", timeout=PATIENCE) as session:
        wrong = await what_is_wrong(session, dsn, settings)
        return await look(session, socket.gethostname(), schema=wrong is None), wrong


def _database_away(error: Exception) -> Finding:
    known = told(error)
    detail = known.sentence if known else str(error)
    return Finding(
        "database", ok=False, detail=detail, remedy="Without it nothing is claimed or sent."
    )


def _database(health: Health, schema: str | None, settings: Settings) -> Iterator[Finding]:
    which = "embedded" if settings.database_url is None else "DATABASE_URL"
    version = f"PostgreSQL {health.version} ({which})"
    if health.read_only:
        yield Finding(
            "database",
            ok=False,
            detail=f"{version} is read-only",
            remedy="Point DATABASE_URL at the primary, or end its read-only mode.",
        )
    else:
        yield Finding("database", ok=True, detail=version)
    if schema is None:
        yield Finding("schema", ok=True, detail="as this program needs it")
    else:
        yield Finding("schema", ok=False, detail=schema, remedy="Run 'dispatcher migrate'.")
    ahead = health.time - time.time()
    apart = f"the database's is {lasting(abs(ahead))} {'ahead' if ahead > 0 else 'behind'}"
    if abs(ahead) > CLOCKS_APART:
        yield Finding(
            "clocks",
            ok=False,
            detail=apart,
            remedy="Set both machines' clocks by NTP; quotas go by the database's.",
        )
    else:
        yield Finding("clocks", ok=True, detail=apart)


def _provider(settings: Settings) -> Finding:
    parts = urlsplit(settings.provider_url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    try:
        with socket.create_connection((host, port), timeout=PATIENCE) as connection:
            if secure:
                ssl.create_default_context().wrap_socket(connection, server_hostname=host).close()
    except OSError as error:
        return Finding(
            "provider",
            ok=False,
            detail=f"{host}:{port} cannot be reached ({_phrase(error)})",
            remedy="Check DISPATCHER_PROVIDER_URL, the firewall, and the provider's notices.",
        )
    return Finding("provider", ok=True, detail=f"{host}:{port} takes connections")


def _http(settings: Settings, health: Health | None) -> Finding:
    reports = "on" if settings.dlr_token is not None else "off, no DISPATCHER_DLR_TOKEN here"
    if settings.http_port == 0:
        return Finding(
            "reports",
            ok=True,
            detail=f"{reports}; the port is free to choose, see http.listening in the log",
        )
    address = f"{settings.http_host}:{settings.http_port}"
    try:
        answer = _get(_reachable(settings.http_host), settings.http_port, "/healthz")
    except OSError as error:
        if health is None or not health.workers_here:
            return Finding(
                "reports",
                ok=True,
                detail=f"{reports}; no worker seems to run here, and nothing answers at {address}",
            )
        return Finding(
            "reports",
            ok=False,
            detail=f"{address} does not answer ({_phrase(error)})",
            remedy="Start 'dispatcher run' here, or set DISPATCHER_HTTP_HOST and _PORT as it has.",
        )
    except http.client.HTTPException:
        answer = None
    if answer != http.client.OK:
        told = "not in HTTP" if answer is None else f"with HTTP status {answer}"
        return Finding(
            "reports",
            ok=False,
            detail=f"{address} answers {told}",
            remedy="Another program has the port: set DISPATCHER_HTTP_PORT.",
        )
    return Finding("reports", ok=True, detail=f"{reports}; {address} answers")


def _get(host: str, port: int, path: str) -> int | None:
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def _reachable(host: str) -> str:
    """Where a server that listens at a host can be reached from this machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


def _phrase(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {PATIENCE:g} seconds"
    return error.strerror or type(error).__name__
