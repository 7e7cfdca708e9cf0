"""The command `dispatcher simulator`."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from dispatcher.simulator.config import Config, load, merge, pairs_of, service_of
from dispatcher.simulator.server import Simulator, State

_WIDTH = 79


def simulator(  # noqa: PLR0913 - each option of the command is an argument
    *,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one. Default: 0.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="All settings; the options below are laid over it. Keys: host, port, seed, "
            "clock_offset, log_size, services (a list), ban, faults, reports.",
        ),
    ] = None,
    service: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID:KEY=VALUE,…",
            help="A service; may be repeated. Keys: user, day, week, month, delay (seconds), "
            "timezone, allowed_ips, templates, disabled. With none, any service is accepted.",
        ),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="Seconds before an answer. Default: 0.")
    ] = None,
    faults: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=RATE,…",
            help="Shares of requests from 0 to 1: drop, reset, hang, error (5xx), garbage, late "
            "(accepted, then closed without an answer).",
        ),
    ] = None,
    ban_after: Annotated[
        int | None, typer.Option(metavar="N", help="Ban once, after N accepted messages.")
    ] = None,
    ban_refused: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Ban an address for more than N answers LIMIT_DELAY or INVALID_… in 10 seconds.",
        ),
    ] = None,
    ban_for: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long a ban lasts. Default: 60.")
    ] = None,
    dlr_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where delivery reports go; without it none are sent."),
    ] = None,
    dlr: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=VALUE,…",
            help="Spans MIN:MAX in seconds: enroute, final; shares of messages: undelivered, "
            "early, late, doubled, swapped, lost; late_by (seconds); parameter names: id_param, "
            "status_param.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Repeat the chances of a run. Default: drawn, and shown at the end."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Play the provider: a stand-in for SMSPAY with limits, faults and reports.

    Example: 20 messages a second, 1000 a day, a hundredth dropped, reports sent:

    \b
    dispatcher simulator --port 8025 --service 42:user=7,day=1000,delay=0.05 \\
        --latency 0.05:0.15 --faults drop=0.01 \\
        --dlr-url http://127.0.0.1:8080/dlr/TOKEN

    While it runs: GET /simulator/received and /simulator/messages tell what came;
    POST /simulator/set takes the keys of --config, and ban_now (seconds) and
    unban (true); POST /simulator/reset forgets. A summary is printed at the end.
    """  # noqa: D301 - the character \b itself keeps Typer from joining the lines after it
    try:
        base = load(config, Config()) if config else Config()
        changes = {
            **_given({"host": host, "port": port, "seed": seed}),
            "services": [service_of(text) for text in service or ()],
            "ban": _given({"after": ban_after, "refused": ban_refused, "seconds": ban_for}),
            "faults": pairs_of(faults or "") | _given({"latency": latency}),
            "reports": pairs_of(dlr or "") | _given({"url": dlr_url}),
        }
        chosen = merge(base, changes)
    except ValueError as error:
        _fail(str(error), 2)
    try:
        uvloop.run(_serve(chosen, as_json=json_))
    except OSError as error:
        # uvloop puts an address and words of its own where the system's words belong.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        _fail(
            f"Cannot listen on {chosen.host}:{chosen.port} ({reason}): "
            "choose another with --host and --port.",
            1,
        )


def _given(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _fail(sentence: str, code: int) -> NoReturn:
    typer.echo(sentence, err=True)
    raise typer.Exit(code)


async def _serve(config: Config, *, as_json: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Simulator(config) as running:
        if as_json:
            _line({"event": "listening", "url": running.address})
        else:
            typer.echo(f"listening on {running.address}")
        sys.stdout.flush()
        await running.serve_until(stop)
        state = running.received()
    if as_json:
        doubles = [
            {**double, "msisdn": _masked(double["msisdn"]), "text": None}
            for double in state["doubles"]
        ]
        _line({"event": "summary", **state, "doubles": doubles})
    else:
        show(state, Console(width=min(Console().width, _WIDTH)))


def _line(content: dict[str, object]) -> None:
    typer.echo(json.dumps(content, ensure_ascii=False))


def _masked(msisdn: str | None) -> str | None:
    return f"{msisdn[:5]}***{msisdn[-4:]}" if msisdn and len(msisdn) > 9 else msisdn and "***"


def show(state: State, console: Console) -> None:
    """Print the summary for people: no text, and numbers masked."""
    table = Table("what the provider received", "")
    table.columns[1].justify = "right"
    rows: list[tuple[str, object]] = [
        ("requests", state["requests"]),
        ("messages", state["messages"]),
        ("accepted", state["accepted"]),
        *((f"answered {name}", count) for name, count in sorted(state["answers"].items())),
        *((f"fault {name}", count) for name, count in sorted(state["faults"].items())),
        ("no HTTP", state["malformed"]),
        ("bans", state["bans"]),
        *((f"reports {name}", count) for name, count in state["reports"].items()),
        ("asked for more than once", state["repeated"]),
        ("received twice", state["received_twice"]),
        ("seed", state["seed"]),
    ]
    for name, value in rows:
        table.add_row(name, str(value))
    console.print(table)
    if state["services"]:
        services = Table("service", "requests", "accepted", "too soon", "least spacing")
        for column in services.columns[1:]:
            column.justify = "right"
        for name, service in state["services"].items():
            spacing = service["min_spacing_accepted"]
            services.add_row(
                name,
                str(service["requests"]),
                str(service["accepted"]),
                str(service["refused_for_delay"]),
                "" if spacing is None else f"{spacing * 1000:.2f} ms",
            )
        console.print(services)
    for double in state["doubles"][:10]:
        console.print(
            f"twice: {_masked(double['msisdn'])} by service {double['service_id']}: "
            f"{double['accepted']} accepted, {double['swallowed']} swallowed"
        )
