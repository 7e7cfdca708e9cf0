"""Runs the benchmarks: `python -m bench [--quick] [--only CASE]...`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import database, picture, report
from bench.report import Finding
from bench.size import FULL, QUICK, Size

CASES: Final = (
    *("throughput", "latency", "idle", "pace", "reports", "logs"),
    *("capacity", "growth", "lifetime"),
)

RESULTS: Final = Path(__file__).parent / "results"


async def _measure(cases: list[str], size: Size) -> list[Finding]:
    console = Console(width=max(100, Console().width))
    findings = []
    async with database.running() as server:
        for case in cases:
            for finding in await import_module(f"bench.cases.{case}").measure(server, size):
                report.progress("")
                report.show(console, finding)
                findings.append(finding)
    return findings


def main() -> None:
    """Measure, show and write down."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, in a minute")
    parser.add_argument("--only", action="append", choices=CASES, help="this case; repeatable")
    asked = parser.parse_args()
    began = time.monotonic()
    name = "quick" if asked.quick else "latest"
    where = report.circumstances(" ".join(["python -m bench", *sys.argv[1:]]))
    findings = asyncio.run(_measure(asked.only or list(CASES), QUICK if asked.quick else FULL))
    report.write(RESULTS, name, where, findings)
    picture.draw(RESULTS, name, findings)
    sys.stdout.write(
        f"{time.monotonic() - began:.0f} seconds; written to bench/results/{name}.json, .md, "
        ".png and .svg\n"
    )


if __name__ == "__main__":
    main()
