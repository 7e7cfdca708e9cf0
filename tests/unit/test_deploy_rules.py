"""deploy/ and the code tell the same: metrics, labels, headings of the runbook, settings."""

import json
import re
from collections import Counter
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dispatcher import app
from dispatcher.metrics import GAUGES, Metrics, Sample
from dispatcher.settings import Settings

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus-rules.yml"
DASHBOARD = ROOT / "deploy/grafana-dashboard.json"
UNIT = ROOT / "deploy/dispatcher.service"

METRIC = re.compile(r"\b(?:dispatcher|process|python)_[a-z0-9_]+")
GROUPED = re.compile(r"\b(?:by|on|without|ignoring) \(([^)]*)\)")
MATCHED = re.compile(r"\{([a-z_]+)=")


def alerts() -> list[dict[str, Any]]:
    """All alerts, of all groups."""
    content = yaml.safe_load(RULES.read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """All panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> dict[str, str]:
    """Every expression, by where it stands."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for panel in panels():
        found |= {f"{panel['title']} {t['refId']}": t["expr"] for t in panel["targets"]}
    return found


def exposed() -> dict[str, set[str]]:
    """The metrics that a worker exposes when everything has happened once, with their labels."""
    metrics = Metrics()
    metrics.outcomes(1, 42, "accepted", "MSG_OK")
    metrics.report(None, matched=False)
    metrics.refused("wrong token")
    samples = [Sample(name, ("a",) * len(family.labels), 1.0) for name, family in GAUGES.items()]
    text = metrics.render(samples).decode()
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def headings() -> set[str]:
    """The headings of the runbook, as a link names them."""
    lines = (ROOT / "docs/operations.md").read_text().splitlines()
    return {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in lines
        if line.startswith("#")
    }


@pytest.mark.parametrize(("place", "expression"), expressions().items())
def test_each_metric_and_label_exists(place: str, expression: str) -> None:
    """An alert or a panel names only metrics and labels that a worker exposes."""
    known = exposed()
    names = set(METRIC.findall(expression))
    assert names or "up{" in expression
    assert names <= known.keys()
    labels = {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}
    labels |= set(MATCHED.findall(expression))
    assert labels <= {label for name in names for label in known[name]} | {"job", "instance"}


def test_each_alert_says_what_to_do() -> None:
    """An alert has a severity, a sentence, and a heading of the runbook that exists."""
    assert max(Counter(rule["alert"] for rule in alerts()).values()) == 1
    for rule in alerts():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"].endswith(".")
        document, _, heading = rule["annotations"]["runbook"].partition("#")
        assert document == "docs/operations.md"
        assert heading in headings(), rule["alert"]


def test_each_alarming_gauge_has_an_alert() -> None:
    """What can only be bad is watched by an alert."""
    watched = {name for rule in alerts() for name in METRIC.findall(rule["expr"])}
    alarming = ("banned", "ill", "blocked", "in_doubt", "oldest_due_age_seconds", "lag_seconds")
    assert {name for name in exposed() if name.endswith(alarming)} <= watched


def test_each_metric_of_ours_is_on_the_dashboard_or_in_an_alert() -> None:
    """No metric is exposed that nobody looks at."""
    seen = {name for expression in expressions().values() for name in METRIC.findall(expression)}
    ours = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in exposed()
        if name.startswith("dispatcher_")
    }
    looked_at = {re.sub(r"_bucket$", "", name) for name in seen}
    assert ours - looked_at <= {"dispatcher_sending", "dispatcher_egress_probe_timestamp_seconds"}


def test_panels_do_not_overlap() -> None:
    """Each panel has a place of its own on the dashboard's 24 columns."""
    taken: Counter[tuple[int, int]] = Counter()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken.update(
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
    assert set(taken.values()) == {1}
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_the_unit_gives_time() -> None:
    """systemd waits longer for the end than the drain takes, and for signs of life than they do."""
    # A directive may be given twice, which configparser only takes when it is not strict.
    unit = RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # how its documentation says to keep the case
    unit.read(UNIT)
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert float(service["TimeoutStopSec"]) > Settings.model_fields["drain"].default + 5
    assert float(service["WatchdogSec"]) > app.STANDS_STILL + 2 * app.WATCHDOG
    assert service["TimeoutStartSec"] == "infinity"
    assert service["RestartPreventExitStatus"] == "2"
    assert service["ExecStart"].endswith("/dispatcher run")
    assert service["NoNewPrivileges"] == "yes"
