"""The command `dispatcher demo`, whole: real workers, a real simulator, a real ban."""

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from fcntl import ioctl
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SENT = {"accepted", "enroute", "delivered", "undeliverable"}


@pytest.fixture
def environment(data_dir: Path) -> dict[str, str]:
    """Of a user who has a database and a provider, which the demo must leave alone."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("DISPATCHER_")}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/nothing",
        "DISPATCHER_DATA_DIR": str(data_dir),
        "DISPATCHER_PROVIDER_URL": "http://127.0.0.1:9/",
        "DISPATCHER_EGRESS": "mine",
        "TERM": "xterm",
    }


@contextmanager
def started(environment: dict[str, str], *options: str) -> Iterator[subprocess.Popen[str]]:
    """A demo whose output is read by the test."""
    with subprocess.Popen(
        [sys.executable, "-m", "dispatcher", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=environment["DISPATCHER_DATA_DIR"],
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def sofia() -> date:
    """The day by which the demo's services count."""
    return datetime.now(ZoneInfo("Europe/Sofia")).date()


@pytest.mark.slow
def test_result_as_json(environment: dict[str, str], data_dir: Path) -> None:
    """It ends well and tells what became of all messages, what held them back, and none twice."""
    began = sofia()
    with started(environment, "--json") as process:
        out, err = process.communicate(timeout=110)

    assert process.returncode == 0, err
    end: dict[str, Any] = json.loads(out)
    assert (end["messages"], end["received_twice"], end["lost"]) == (2000, 0, 0)
    statuses = {s["service_id"]: s["statuses"] for s in end["services"]}
    sent = {id_: sum(n for s, n in of.items() if s in SENT) for id_, of in statuses.items()}
    assert sum(sent.values()) == end["accepted"]
    assert sent[43] == 300
    held = {limit["limit"]: limit for limit in end["held_back"]}
    if began == sofia():
        assert sent[42] == held["day"]["allowed"] == held["day"]["used"] == 1000
    assert held["day"]["waiting"] == statuses[42].get("pending", 0) == 1700 - sent[42]
    assert held["min_delay"]["closest"] >= held["min_delay"]["seconds"]
    assert held["ban"]["refused"] >= 2
    assert held["ban"]["probes"] >= 2
    assert (
        end["requests"] == end["accepted"] + held["ban"]["refused"] + held["min_delay"]["refused"]
    )
    assert "The provider bans our IP address" in err
    assert re.search(r"\d of 1,700 invoices and \d+ of 300 reminders are sent", err)
    assert [path.name for path in data_dir.iterdir()] == ["demo"]


@pytest.mark.slow
def test_on_a_terminal(environment: dict[str, str], data_dir: Path) -> None:
    """On a terminal it shows bars, and in the end tables that fit 80 columns and what to try."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(data_dir)
        os.execve(  # noqa: S606 - the test's own process, after a fork
            sys.executable, [sys.executable, "-m", "dispatcher", "demo"], environment
        )
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    shown = ""
    try:
        while some := os.read(terminal, 65_536):
            shown += some.decode(errors="replace")
    except OSError:  # how a terminal's end is read
        pass
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)

    assert code == 0, shown
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", shown)]
    assert max(map(len, lines)) <= 80
    assert re.search(r"━.* sent +\d+ delivered", shown)
    assert "Received twice: 0. Lost: 0." in lines
    commands = lines[lines.index("  unset DATABASE_URL; export DISPATCHER_DATA_DIR=demo") + 1 :]
    assert [command.split()[3] for command in commands[:3]] == ["status", "why", "export"]

    listed = subprocess.run(
        [sys.executable, "-m", "dispatcher", "service", "list", "--json"],
        env={
            **environment,
            "DATABASE_URL": "",
            "DISPATCHER_DATA_DIR": str(data_dir / "demo"),
        },
        capture_output=True,
        check=True,
    )
    services = json.loads(listed.stdout)
    assert {s["service_id"]: s["paused"] for s in services} == {42: True, 43: True}


def test_stop_in_the_middle(environment: dict[str, str]) -> None:
    """Ctrl-C ends it with all that it started; a second demo beside it is told to wait."""
    with started(environment) as process:
        assert process.stdout
        for line in process.stdout:
            if "are inserted" in line:
                break
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3, "two workers and a simulator"

        with started(environment) as second:
            _, told = second.communicate(timeout=60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert (second.returncode, process.returncode) == (1, 1)
    assert re.fullmatch(r"A demo runs in \S+ already; wait for its end\.\n", told)
    assert err == "Stopped before its end, and cleaned up.\n"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
