"""Processes under measurement: started, watched from outside, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psutil

ROOT: Final = Path(__file__).resolve().parents[1]

PATIENCE: Final = 120.0
"""Seconds after which a benchmark gives up waiting."""

LOOK: Final = 0.01
"""Seconds between two looks at a process."""


class Process:
    """A process that runs; what it prints goes to a file."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._seen = psutil.Process(process.pid)
        self.log = log

    async def first_line(self) -> str:
        """Wait for the first line that it prints."""
        async with asyncio.timeout(PATIENCE):
            while b"\n" not in (printed := self.log.read_bytes()):
                self.check()
                await asyncio.sleep(LOOK)
        return printed.split(b"\n")[0].decode()

    async def printed(self, word: str) -> None:
        """Wait until it has printed a word."""
        async with asyncio.timeout(PATIENCE):
            while word.encode() not in self.log.read_bytes():
                self.check()
                await asyncio.sleep(LOOK)

    def told(self) -> str:
        """The end of what it has printed."""
        return self.log.read_text()[-2000:]

    def cpu(self) -> float:
        """Seconds of CPU so far, in user and kernel mode."""
        times = self._seen.cpu_times()
        return times.user + times.system

    def memory(self) -> int:
        """Bytes of memory that are resident now."""
        return self._seen.memory_info().rss

    def check(self) -> None:
        """Raise if it has ended by itself."""
        if self._process.returncode is not None:
            raise RuntimeError(
                f"a process ended with {self._process.returncode}:\n{self.log.read_text()[-2000:]}"
            )

    async def exited(self) -> int:
        """Wait for its end; returns the exit code."""
        async with asyncio.timeout(PATIENCE):
            return await self._process.wait()

    async def stop(self) -> None:
        """Ask it to end, as a supervisor would, and wait."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            await self.exited()

    async def kill(self) -> None:
        """End it at once."""
        if self._process.returncode is None:
            self._process.kill()
            await self.exited()


@asynccontextmanager
async def started(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    """Run a command from the checkout's root, with no setting but those given."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "DATABASE_URL" and not name.startswith(("DISPATCHER_", "PG"))
    }
    with log.open("wb") as output:
        process = Process(
            await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**inherited, **(environment or {})},
            ),
            log,
        )
    try:
        yield process
    finally:
        await process.kill()


async def done(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run a command to its end; raises RuntimeError if it fails."""
    async with started(command, log, environment) as process:
        code = await process.exited()
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{process.told()}")
