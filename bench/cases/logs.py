"""Logs: what one line costs the worker."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.database import Server
from bench.processes import started
from bench.report import Finding, Target, progress, spread
from bench.size import Size


async def measure(server: Server, size: Size) -> list[Finding]:
    """Microseconds of CPU for the line of an accepted message, written to a file."""
    del server
    progress("logs: lines to a file")
    took = []
    with tempfile.TemporaryDirectory(prefix="dispatcher-logs-") as folder:
        for number in range(size.rounds):
            command = (sys.executable, "-m", "bench.logger", str(size.log_lines))
            async with started(command, Path(folder) / str(number)) as process:
                await process.exited()
                took.append(float(process.told().splitlines()[-1]))
    return [
        Finding(
            "logs",
            "Logs: the line of an accepted message, to a file",
            ("", "CPU of a line, us"),
            [["dispatcher", spread(took, "{:.1f}".format)]],
            [Target("CPU of a line", "<= 20 us", f"{median(took):.1f} us", median(took) <= 20)],
            [f"{size.log_lines:,} lines."],
            {"us": took},
        )
    ]
