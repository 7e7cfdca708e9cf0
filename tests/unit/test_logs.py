"""Logging is set up once for a process, so each test looks at a process of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

SPEAKING = """
import structlog
log = structlog.stdlib.get_logger()
from dispatcher import logs
logs.configure({form!r}, {level!r})
log.debug("told.debug")
log.info("told.info", id=7, reply=None, text="Привет")
log.warning("told.warning")
log.error("told.error")
"""

FAILING = """
import structlog
from dispatcher import logs
logs.configure("json", "info")

def inner(number):
    raise ValueError(f"secret {number}")

def outer():
    inner("359881234567")

try:
    outer()
except ValueError as error:
    structlog.get_logger().error("it.failed", exc_info=error)
structlog.get_logger().error("it.failed", exc_info=None)
"""

LIBRARIES = """
import logging
from dispatcher import logs
logs.configure("json", "debug")
logging.getLogger("asyncio").error("Task exception: secret 359881234567")
logging.getLogger("aiohttp").warning("secret")
"""


UNHEARD = """
import os, structlog, sys
from dispatcher import logs
logs.configure({form!r}, "info")
log = structlog.get_logger()
stdout = os.dup(1)
read, write = os.pipe()
os.close(read)
for broken in (write, os.open("/dev/full", os.O_WRONLY)):
    os.dup2(broken, 1)
    log.error("told.unheard")
os.dup2(stdout, 1)
log.info("told.again", lost=logs.lines.lost)
"""


TORN = """
import fcntl, os, sys, structlog
from dispatcher import logs
logs.configure("json", "info")
log = structlog.get_logger()
stdout = os.dup(1)
read, write = os.pipe()
fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
os.set_blocking(write, False)
os.dup2(write, 1)
with logs.lines.together():
    for number in range(100):
        log.info("told.partly", number=number)
partly = os.read(read, 1_000_000)
log.info("told.again")
again = os.read(read, 1_000_000)
os.dup2(stdout, 1)
log.info("told.lost", lines=logs.lines.lost, partly=partly.decode(), again=again.decode())
"""


def output(program: str) -> tuple[str, str]:
    """What a program prints on standard output and on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env=ENVIRONMENT,
        check=True,
        encoding="utf-8",
    )
    return done.stdout, done.stderr


def events(program: str) -> list[dict[str, Any]]:
    """The lines that a program logs, each an object of JSON."""
    out, errors = output(program)
    assert errors == ""
    return [json.loads(line) for line in out.splitlines()]


def test_json_lines() -> None:
    """Each line is an object of its own with timestamp, level, event and the fields given."""
    before = datetime.now().astimezone()
    told = events(SPEAKING.format(form="json", level="debug"))
    after = datetime.now().astimezone()

    assert [event["event"].removeprefix("told.") for event in told] == [
        *("debug", "info", "warning", "error")
    ]
    assert all(event["event"] == f"told.{event['level']}" for event in told)
    assert told[1].items() >= {"id": 7, "reply": None, "text": "Привет"}.items()
    for event in told:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event["timestamp"])
        moment = datetime.fromisoformat(event["timestamp"])
        assert before - timedelta(seconds=1) <= moment <= after + timedelta(seconds=1)
    assert [event["timestamp"] for event in told] == sorted(event["timestamp"] for event in told)


def test_level() -> None:
    """Below the level that is set nothing is told."""
    told = events(SPEAKING.format(form="json", level="warning"))

    assert [event["level"] for event in told] == ["warning", "error"]


def test_exception_without_its_text() -> None:
    """Of an exception its kind and place are told, and not its text, which could be private."""
    told, without = events(FAILING)

    assert told["exception"] == "ValueError"
    assert re.fullmatch(
        r"<string>:\d+:inner < <string>:\d+:outer < <string>:\d+:<module>", told["at"]
    )
    assert "secret" not in json.dumps(told)
    assert "exception" not in without


def test_libraries_are_silent() -> None:
    """What libraries log themselves, which could hold anything, appears nowhere."""
    assert output(LIBRARIES) == ("", "")


def test_console() -> None:
    """For people a line begins with the time and the level, without colours in a file."""
    out, errors = output(SPEAKING.format(form="console", level="info"))

    assert errors == ""
    assert len(out.splitlines()) == 3
    assert "\x1b[" not in out
    assert re.match(r"\d{4}-.*Z \[info +\] told\.info +id=7 reply=None", out)


def test_console_on_a_terminal() -> None:
    """On a terminal the lines are coloured."""
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", SPEAKING.format(form="console", level="error")],
            stdout=theirs,
            env={**ENVIRONMENT, "TERM": "xterm"},
            check=True,
        )
        out = os.read(ours, 10_000).decode()
    finally:
        os.close(theirs)
        os.close(ours)

    assert "told.error" in out
    assert "\x1b[" in out


@pytest.mark.parametrize("form", ["json", "console"])
def test_nobody_listens(form: str) -> None:
    """A line that cannot be written raises nothing and is counted, and the next may be told."""
    out, errors = output(UNHEARD.format(form=form))

    assert errors == ""
    (line,) = out.splitlines()
    assert "told.again" in line
    assert re.search(r"lost\W+2\b", line)


def test_cut_short() -> None:
    """Of lines that do not all find room those are counted that were lost, and none is spoilt."""
    (told,) = events(TORN)
    whole = told["partly"].split("\n")[:-1]

    assert 0 < len(whole) < 100
    assert [json.loads(line)["number"] for line in whole] == list(range(len(whole)))
    assert told["lines"] == 100 - len(whole)
    assert json.loads(told["again"].splitlines()[-1])["event"] == "told.again"
