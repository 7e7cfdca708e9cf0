"""The cases in pictures: one figure, a panel each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import matplotlib as mpl
from matplotlib import pyplot as plt

from bench.report import Finding

Axes: TypeAlias = Any
"""matplotlib's, which is installed only where pictures are drawn."""

OURS: Final = "#1b6ca8"
THEIRS: Final = "#b8c4ce"
GOAL: Final = "#c0392b"


def draw(folder: Path, name: str, findings: Sequence[Finding]) -> None:
    """Write `name`.png and `name`.svg."""
    panels: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
        "throughput": _throughput,
        "cost": _cost,
        "latency": _latency,
        "growth": _growth,
        "capacity": _capacity,
        "pace": _pace,
        "lifetime": _lifetime,
    }
    drawn = [finding for finding in findings if finding.case in panels]
    mpl.use("Agg")
    if not drawn:
        return
    # The same numbers make the same file.
    mpl.rcParams.update({"svg.hashsalt": "bench", "font.size": 9, "axes.titlesize": 10})
    rows = -(-len(drawn) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(13, 3.4 * rows), squeeze=False)
    places = [axes for row in grid for axes in row]
    for axes, finding in zip(places, drawn, strict=False):
        panels[finding.case](axes, finding.data)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(drawn) :]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=110)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[Sequence[float]], form: str, ours: set[str]
) -> None:
    """Horizontal bars of medians, the first on top, with the spread."""
    middles = [median(found) for found in values]
    axes.barh(
        labels,
        middles,
        xerr=[
            [middle - min(found) for middle, found in zip(middles, values, strict=True)],
            [max(found) - middle for middle, found in zip(middles, values, strict=True)],
        ],
        color=[OURS if label in ours else THEIRS for label in labels],
        error_kw={"ecolor": "#555555", "capsize": 2},
    )
    most = max(max(found) for found in values)
    for label, middle, found in zip(labels, middles, values, strict=True):
        axes.text(max(found) + most * 0.01, label, f" {middle:{form}}", va="center")
    axes.set_xlim(0, most * 1.15)
    axes.invert_yaxis()


def _throughput(axes: Axes, data: dict[str, Any]) -> None:
    shown = {name: found for name, found in data.items() if name != "raw"}
    _bars(
        axes,
        [found["label"] for found in shown.values()],
        [found["rates"] for found in shown.values()],
        ",.0f",
        {"dispatcher"},
    )
    axes.set_title("Messages a second, 100 in flight")


def _cost(axes: Axes, data: dict[str, Any]) -> None:
    shown = {name: found for name, found in data.items() if name != "raw"}
    labels = [found["label"] for found in shown.values()]
    worker = [median(found["worker_cpu_ms"]) for found in shown.values()]
    database = [median(found["database_cpu_ms"]) for found in shown.values()]
    axes.barh(labels, worker, color=[OURS if la == "dispatcher" else THEIRS for la in labels])
    axes.barh(labels, database, left=worker, color="#8e6c8a", label="PostgreSQL")
    for label, low, high in zip(labels, worker, database, strict=True):
        axes.text(low + high, label, f" {low:.3f} + {high:.3f}", va="center")
    axes.set_xlim(0, max(low + high for low, high in zip(worker, database, strict=True)) * 1.35)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="center right")
    axes.set_title("CPU of a message, ms: the process, and PostgreSQL")


def _latency(axes: Axes, data: dict[str, Any]) -> None:
    others = iter(("#e39b3b", "#7a8793"))
    for name, waits in data["ms"].items():
        ordered = sorted(max(wait, 0.1) for wait in waits)
        shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
        ours = name == "dispatcher"
        axes.step(
            ordered,
            shares,
            label=data["labels"][name],
            color=OURS if ours else next(others),
            linewidth=2 if ours else 1,
        )
    axes.axvline(3, color=GOAL, linestyle=":", linewidth=1)
    axes.axvline(15, color=GOAL, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("ms; dotted: goals for p50 and p99")
    axes.legend(frameon=False, loc="lower right")
    axes.set_title("From the commit to the provider, at 20 a second")


def _growth(axes: Axes, data: dict[str, Any]) -> None:
    found = data["situations"]
    _bars(
        axes,
        list(found),
        [situation["claim_ms"] for situation in _middle(found.values())],
        ".2f",
        set(found),
    )
    axes.set_title("Claim of 100 messages, ms (median and quartiles)")


def _middle(situations: Any) -> list[dict[str, list[float]]]:
    """The values between the quartiles: the spread is of what is usual."""
    return [
        {
            name: sorted(values)[len(values) // 4 : max(1, len(values) - len(values) // 4)]
            for name, values in situation.items()
            if isinstance(values, list)
        }
        for situation in situations
    ]


def _capacity(axes: Axes, data: dict[str, Any]) -> None:
    for name, label, color in (
        ("statements", "their statements alone", "#8e6c8a"),
        ("workers", "workers with provider and PostgreSQL", OURS),
    ):
        found = {int(number): value for number, value in data[name].items()}
        axes.plot(list(found), list(found.values()), marker="o", label=label, color=color)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("workers, each on a service of its own")
    axes.legend(frameon=False)
    axes.set_title("Messages a second on one machine")


def _lifetime(axes: Axes, data: dict[str, Any]) -> None:
    sizes = data["sizes"]
    messages = [data["step"] * (number + 1) / 1000 for number in range(len(sizes))]
    for name, color in (
        ("outbox_due", OURS),
        ("outbox_held", "#e39b3b"),
        ("outbox_pkey", "#8e6c8a"),
        ("outbox_provider_id", "#7a8793"),
    ):
        axes.plot(messages, [found[name] / 1e6 for found in sizes], label=name, color=color)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("thousand messages sent")
    axes.legend(frameon=False)
    axes.set_title("Indexes of the outbox, MB")


def _pace(axes: Axes, data: dict[str, Any]) -> None:
    labels = [f"{number} worker{'s' if number != '1' else ''}" for number in data]
    used = [found["used"] * 100 for found in data.values()]
    axes.barh(labels, used, color=OURS)
    axes.axvline(95, color=GOAL, linestyle=":", linewidth=1)
    for label, share, found in zip(labels, used, data.values(), strict=True):
        axes.text(
            2, label, f"{share:.1f} %, {found['refused']:.2%} refused", va="center", color="w"
        )
    axes.set_xlim(0, 105)
    axes.set_title("Share of the allowed rate used, min_delay 50 ms")
