"""Throughput and cost: a backlog sent by each contender in turn, watched from outside."""

from __future__ import annotations

from statistics import median
from typing import Final

from bench.database import Server
from bench.race import Contender, Result, race
from bench.report import Finding, Target, progress, spread
from bench.size import Size

CONTENDERS: Final = (
    *("dispatcher", "aiohttp_plain", "aiohttp_tuned", "loop", "pgqueuer", "procrastinate"),
    "raw",
)

RATIOS: Final = (
    ("aiohttp_plain", 0.85),
    ("loop", 2.0),
    ("pgqueuer", 2.5),
    ("procrastinate", 12.0),
)
"""How much of each one's rate the dispatcher is to reach at least."""


async def measure(server: Server, size: Size) -> list[Finding]:
    """Both tables: the rates, and what a message costs."""
    contenders = [Contender(name) for name in CONTENDERS]
    results: dict[str, list[Result]] = {name: [] for name in CONTENDERS}
    for number in range(size.rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            progress(f"throughput, round {number + 1} of {size.rounds}: {contender.label}")
            count = max(100, int(size.messages * contender.share))
            results[contender.name].append(await race(server, contender, count))
    return [_throughput(contenders, results), _cost(contenders, results)]


def _throughput(contenders: list[Contender], results: dict[str, list[Result]]) -> Finding:
    ours = [result.rate for result in results["dispatcher"]]
    ratios = {
        name: [mine / other.rate for mine, other in zip(ours, results[name], strict=True)]
        for name in results
    }
    return Finding(
        "throughput",
        "Throughput: messages a second, 100 in flight, a provider that answers at once",
        ("", "messages/s", "dispatcher / this"),
        [
            [
                contender.label,
                spread([result.rate for result in results[contender.name]], "{:,.0f}".format),
                spread(ratios[contender.name], "{:.2f}".format),
            ]
            for contender in contenders
        ],
        [
            Target(
                f"times the rate of {Contender(name).label}",
                f">= {goal:g}",
                f"{median(ratios[name]):.2f}",
                median(ratios[name]) >= goal,
            )
            for name, goal in RATIOS
        ],
        [
            (
                "From the first request's arrival at the provider to the last one's; median of the "
                "rounds (least - most). The ratio is taken within each round."
            ),
            *(f"{contender.label}: {contender.settings}." for contender in contenders),
        ],
        {
            name: {"label": Contender(name).label, "rates": [result.rate for result in found]}
            for name, found in results.items()
        },
    )


def _cost(contenders: list[Contender], results: dict[str, list[Result]]) -> Finding:
    def of(name: str, field: str, scale: float, form: str) -> str:
        values = [getattr(result, field) for result in results[name]]
        return "-" if None in values else form.format(median(values) * scale)

    ours = results["dispatcher"]
    transactions = median(result.transactions or 0.0 for result in ours)
    wal = median(result.wal_bytes or 0.0 for result in ours)
    cpu = median(result.worker_cpu for result in ours) * 1000
    plain = median(result.worker_cpu for result in results["aiohttp_plain"]) * 1000
    memory = max(result.memory for result in ours) / 1e6
    return Finding(
        "cost",
        "Cost of a message",
        ("", "its CPU, ms", "PostgreSQL's, ms", "provider's, ms", "transactions", "WAL, B", "MB"),
        [
            [
                contender.label,
                of(contender.name, "worker_cpu", 1000, "{:.3f}"),
                of(contender.name, "database_cpu", 1000, "{:.3f}") if contender.recorded else "-",
                of(contender.name, "provider_cpu", 1000, "{:.3f}"),
                of(contender.name, "transactions", 1, "{:.3f}"),
                of(contender.name, "wal_bytes", 1, "{:,.0f}"),
                f"{max(r.memory for r in results[contender.name]) / 1e6:.0f}",
            ]
            for contender in contenders
        ],
        [
            Target(
                "transactions a message", "<= 0.03", f"{transactions:.3f}", transactions <= 0.03
            ),
            Target("WAL a message", "<= 1,000 B", f"{wal:,.0f} B", wal <= 1000),
            Target(
                "CPU of the worker a message",
                f"<= {0.32 / 0.27:.2f} x aiohttp alone",
                f"{cpu:.3f} ms, {cpu / plain:.2f} x",
                cpu / plain <= 0.32 / 0.27,
            ),
            Target("CPU of the worker a message", "<= 0.32 ms", f"{cpu:.3f} ms", cpu <= 0.32),
            Target("memory of the worker", "< 150 MB", f"{memory:.0f} MB", memory < 150),
        ],
        [
            (
                "CPU in user and kernel mode over the middle nine tenths of a run; transactions "
                "and WAL of the whole run, start and end included; memory: the most that was seen."
            ),
        ],
        {
            name: {
                "label": Contender(name).label,
                "worker_cpu_ms": [result.worker_cpu * 1000 for result in found],
                "database_cpu_ms": [result.database_cpu * 1000 for result in found],
                "provider_cpu_ms": [result.provider_cpu * 1000 for result in found],
                "transactions": [result.transactions for result in found],
                "wal_bytes": [result.wal_bytes for result in found],
                "memory": [result.memory for result in found],
            }
            for name, found in results.items()
        },
    )
