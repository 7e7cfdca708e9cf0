"""The command `dispatcher simulator` as a process."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

FAULTS = "latency, drop, reset, hang, error, garbage, late.\n"
AS_IN = "as in 42:day=1000.\n"
COMMAND = [sys.executable, "-m", "dispatcher.simulator"]
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}


class Running:
    """A simulator in a process of its own."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *options], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self.process.stdout
        self.first = self.process.stdout.readline().rstrip("\n")
        url = json.loads(self.first)["url"] if "--json" in options else self.first.split()[-1]
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)

    def get(self, path: str) -> str:
        """The answer's text to a GET."""
        self.connection.request("GET", path)
        return self.connection.getresponse().read().decode()

    def send(self, msisdn: str = "359881234567", text: str = "secret", **more: str) -> str:
        """The provider's answer to one message."""
        extra = "".join(f"&{name}={value}" for name, value in more.items())
        return self.get(
            f"/users/send_bulk.php?user_id=7&service_id=42&msisdn={msisdn}&text={text}{extra}"
        )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> str:
        """What the process prints from now to its end, which must be a good one."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=20)
        assert self.process.returncode == 0
        return output


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts simulators, and ends those that still run."""
    started: list[Running] = []

    def start(*options: str) -> Running:
        started.append(Running(*options))
        return started[-1]

    yield start
    for running in started:
        running.connection.close()
        running.process.kill()
        running.process.communicate()


def failed(*options: str) -> tuple[int, str]:
    """The exit code and the error of a start that fails."""
    done = subprocess.run(
        [*COMMAND, *options],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_summary_for_people(start: Start, number: signal.Signals) -> None:
    """It says where it listens, and at the end what it received: narrow, masked, without texts."""
    running = start("--service", "42:user=7,day=2,delay=0.001")
    assert running.first.startswith("listening on http://127.0.0.1:")
    answers = [running.send(), running.send(text="b"), running.send()]
    while answers.count("MSG_OK") < 2:
        answers.append(running.send())

    output = running.stop(number)

    assert max(map(len, output.splitlines())) < 80
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines()]
    assert ["requests", str(len(answers))] in rows
    assert ["accepted", "2"] in rows
    assert ["answered MSG_OK", "2"] in rows
    assert "359881234567" not in output
    assert "secret" not in output


def test_double_is_named_masked(start: Start) -> None:
    """A message received twice is named at the end by its masked number."""
    running = start()
    assert [running.send(), running.send()] == ["MSG_OK", "MSG_OK"]

    output = running.stop()

    assert "twice: 35988***4567 by service 42: 2 accepted, 0 swallowed" in output


def test_json(start: Start) -> None:
    """With --json the first line tells the address and the last one the summary."""
    running = start("--json", "--seed", "9")
    assert json.loads(running.first)["event"] == "listening"
    running.send()
    running.send()
    told = json.loads(running.get("/simulator/received"))

    summary: dict[str, Any] = json.loads(running.stop())

    assert summary.pop("event") == "summary"
    assert summary["seed"] == 9
    [double] = summary.pop("doubles")
    assert (double["msisdn"], double["text"]) == ("35988***4567", None)
    assert summary == {name: value for name, value in told.items() if name != "doubles"}


def test_options_over_a_file(start: Start, tmp_path: Path) -> None:
    """Options are laid over the file, a service over the one with its number."""
    path = tmp_path / "simulator.json"
    path.write_text(
        json.dumps(
            {
                "services": [{"id": 42, "user": 7, "templates": ["a+"], "disabled": True}],
                "faults": {"hang": 1},
            }
        )
    )
    running = start(
        *("--config", str(path), "--service", "42:disabled=no", "--latency", "0.001:0.002"),
        *("--faults", "hang=0,drop=0", "--ban-after", "1", "--ban-for", "1000"),
        *("--dlr-url", "http://127.0.0.1:1/", "--dlr", "enroute=0.1:0.2,final=1,lost=1"),
    )

    answers = [running.send(text="b"), running.send(text="aa", extended="yes"), running.send()]

    assert answers[0] == "INVALID_PATTERN"
    assert answers[1].startswith("MSG_OK:")
    assert answers[2] == "BAN_IP_TEMP"


@pytest.mark.parametrize(
    ("fault", "error"),
    [("reset", ConnectionResetError), ("drop", http.client.RemoteDisconnected)],
)
def test_faults_on_the_wire(start: Start, fault: str, error: type[Exception]) -> None:
    """A reset is seen as a reset by its client, and a drop as an end without an answer."""
    running = start("--faults", f"{fault}=1")

    # The end without an answer is itself a kind of reset to the client, so compare exactly.
    with pytest.raises(ConnectionError) as caught:
        running.send()

    assert caught.type is error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--faults", "dorp=1"], "faults has no setting 'dorp', but " + FAULTS),
        (["--service", "dya=5"], "'dya=5' must begin with the service's number, " + AS_IN),
        (["--faults", "drop=2"], "faults: drop must be a share from 0 to 1, but is 2.0.\n"),
        (["--latency", "1:0"], "faults: latency must be seconds MIN:MAX, but is 1:0.\n"),
        (["--config", "none.json"], "none.json cannot be read: No such file or directory.\n"),
    ],
)
def test_wrong_option(options: list[str], sentence: str) -> None:
    """A wrong option ends the start with one sentence and code 2."""
    assert failed(*options) == (2, sentence)


def test_port_is_taken() -> None:
    """A port that is taken ends the start with one sentence and code 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        code, error = failed("--port", str(port))

    assert code == 1
    assert error == (
        f"Cannot listen on 127.0.0.1:{port} (Address already in use): "
        "choose another with --host and --port.\n"
    )


def test_help_shows_an_example() -> None:
    """The help fits 80 columns and has an example that can be copied."""
    done = subprocess.run(
        [*COMMAND, "--help"], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )

    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "dispatcher simulator --port 8025 --service 42:user=7,day=1000" in done.stdout
