"""The command `dispatcher run`."""

import asyncio
import gc
import sys

import typer

from dispatcher import app
from dispatcher.settings import load

if sys.platform != "win32":
    import uvloop


def run() -> None:
    """Send what is in the outbox, until SIGTERM or Ctrl-C.

    Any number may run at once, on any number of machines. Reports, health and
    metrics are served on DISPATCHER_HTTP_PORT.

    Example: one worker, with a database and a provider of its own:

    \b
    DATABASE_URL=postgresql://me@db/sms dispatcher run
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    found = load()
    # What is loaded lives until the end, and a message that is answered leaves no cycles: looking
    # for garbage as often as Python does by itself took a twentieth of the time, measured.
    gc.freeze()
    gc.set_threshold(10_000)
    if sys.platform == "win32":
        code = asyncio.run(app.run(found))
    else:
        code = uvloop.run(app.run(found))
    raise typer.Exit(code)
