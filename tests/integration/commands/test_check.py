from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dispatcher.commands import check as module
from tests.integration.commands.conftest import Command, Outcome
from tests.integration.peers import Connection, peer

NAMES = ["settings", "database", "schema", "clocks", "provider", "reports"]


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Something that listens where the provider should."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("DISPATCHER_PROVIDER_URL", f"http://{address}/send")
        monkeypatch.setenv("DISPATCHER_HTTP_PORT", str(_closed_port()))
        yield server


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def failed(done: Outcome) -> dict[str, str]:
    """What failed, with its remedy."""
    return {
        finding["name"]: finding["remedy"] for finding in done.json["checks"] if not finding["ok"]
    }


async def test_all_right(command: Command, provider: socket.socket) -> None:
    """Where all is right each line says so; the provider is asked for nothing."""
    shown = await command("check")
    done = await command("check", "--json")

    assert (shown.code, done.code) == (0, 0)
    assert [line[:4] for line in shown.out.splitlines() if not line.startswith(" ")] == ["ok  "] * 6
    assert max(map(len, shown.out.splitlines())) <= 80
    assert done.json["ok"]
    assert [finding["name"] for finding in done.json["checks"]] == NAMES
    connection, _ = provider.accept()
    with connection:
        assert connection.recv(1) == b""


async def test_wrong_setting(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong setting is named, and nothing else can be checked."""
    monkeypatch.setenv("DISPATCHER_LEASE", "long")

    done = await command("check")

    assert done.code == 1
    assert done.out.startswith("FAIL settings: DISPATCHER_LEASE is wrong: ")
    assert list(failed(await command("check", "--json"))) == ["settings"]


async def test_misspelt(
    command: Command, provider: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is no setting is told, but stops nothing: other programs may have set it."""
    monkeypatch.setenv("DISPATCHER_CONCURENCY", "5")

    done = await command("check", "--json")

    assert done.code == 0
    settings = done.json["checks"][0]
    assert settings["detail"] == "all are right, but this is none: DISPATCHER_CONCURENCY"
    assert settings["remedy"] == "Correct the name, or take it out of the environment."


async def test_database_away(
    command: Command, provider: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the database the rest is still checked."""
    monkeypatch.setenv("DATABASE_URL", f"postgresql://me@127.0.0.1:{_closed_port()}/x")

    done = await command("check", "--json")

    assert done.code == 1
    assert failed(done) == {"database": "Without it nothing is claimed or sent."}
    assert [finding["name"] for finding in done.json["checks"]] == [
        "settings",
        "database",
        "provider",
        "reports",
    ]


async def test_unusable_address(
    command: Command, provider: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that no driver can use is told as such."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me@127.0.0.1/x?sslmode=perhaps")

    done = await command("check", "--json")

    assert done.code != 0
    assert "DATABASE_URL" in repr(done)


async def test_schema(command: Command, provider: socket.socket, connection: Connection) -> None:
    """A schema that is behind is told, with the command that mends it."""
    await connection.execute("DROP TABLE alembic_version")

    done = await command("check", "--json")

    assert failed(done) == {"schema": "Run 'dispatcher migrate'."}


async def test_read_only(command: Command, provider: socket.socket, connection: Connection) -> None:
    """A database that takes no writes is told."""
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    done = await command("check", "--json")

    assert failed(done) == {
        "database": "Point DATABASE_URL at the primary, or end its read-only mode."
    }


@pytest.mark.parametrize(("ahead", "word"), [(60.0, "behind"), (-60.0, "ahead")])
async def test_clocks(
    command: Command,
    provider: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    ahead: float,
    word: str,
) -> None:
    """Clocks that are a minute apart are told, and which is ahead."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)

    done = await command("check")

    assert done.code == 1
    assert f"FAIL clocks: the database's is 1 min {word}\n" in done.out.replace(" 1 s", "")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:{port}/", "Connection refused"),
        ("http://nowhere.invalid/", "nowhere.invalid:80 cannot be reached"),
        ("https://nowhere.invalid/", "nowhere.invalid:443 cannot be reached"),
    ],
)
async def test_provider_away(
    command: Command, monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    """A provider that cannot be reached is told with the reason."""
    monkeypatch.setenv("DISPATCHER_PROVIDER_URL", url.format(port=_closed_port()))

    done = await command("check")

    assert done.code == 1
    assert "FAIL provider: " in done.out
    assert reason in done.out


async def test_provider_without_tls(
    command: Command, provider: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TLS is wanted, a connection alone is not enough."""
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    port = provider.getsockname()[1]
    monkeypatch.setenv("DISPATCHER_PROVIDER_URL", f"https://127.0.0.1:{port}/send")

    assert list(failed(await command("check", "--json"))) == ["provider"]


async def test_reports_off_and_on(
    command: Command, provider: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether reports are taken is told by the token."""
    assert "reports: off, no DISPATCHER_DLR_TOKEN here" in (await command("check")).out
    monkeypatch.setenv("DISPATCHER_DLR_TOKEN", "secret")

    shown = (await command("check")).out

    assert "reports: on" in shown
    assert "secret" not in shown


async def test_any_port(
    command: Command, provider: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the port is chosen at the start, the log is pointed to."""
    monkeypatch.setenv("DISPATCHER_HTTP_PORT", "0")

    assert "see http.listening in the log" in (await command("check")).out.replace("\n    ", " ")


async def test_worker_that_does_not_answer(
    command: Command, provider: socket.socket, database: str, connection: Connection
) -> None:
    """Where a worker runs on this machine, its endpoint must answer."""
    async with peer(database):
        await connection.execute("UPDATE worker SET host = $1", socket.gethostname())

        assert list(failed(await command("check", "--json"))) == ["reports"]


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None),
        (
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
            "Another program has the port: set DISPATCHER_HTTP_PORT.",
        ),
        (b"nonsense\r\n", "Another program has the port: set DISPATCHER_HTTP_PORT."),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "localhost"])  # noqa: S104 - what a person may set
async def test_endpoint(
    command: Command,
    provider: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    answer: bytes,
    remedy: str | None,
) -> None:
    """The endpoint is asked whether it lives, wherever it listens."""
    # One that listens on all addresses, as a worker does where it is told so.
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        monkeypatch.setenv("DISPATCHER_HTTP_HOST", host)
        monkeypatch.setenv("DISPATCHER_HTTP_PORT", str(server.getsockname()[1]))

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                asked = connection.recv(4096)
                connection.sendall(answer if asked.startswith(b"GET /healthz ") else b"no")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        done = await command("check", "--json")
        thread.join(30)

    assert failed(done) == ({} if remedy is None else {"reports": remedy})
