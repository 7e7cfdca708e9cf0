import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.metrics import GAUGES, NOT_SENT, Metrics, Sample

LABELS = {"service", "outcome", "answer", "period", "egress", "status", "reason", "le"}


def parse(text: bytes) -> dict[str, Metric]:
    """The families of an exposition, by name."""
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def values(family: Metric) -> dict[tuple[str, ...], float]:
    """The values of a family by their labels, in the order of the labels' names."""
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def busy() -> Metrics:
    """Metrics that have seen one of everything."""
    metrics = Metrics()
    metrics.outcomes(2, 42, "accepted", "MSG_OK")
    metrics.outcomes(1, 42, "unknown", "in doubt")
    metrics.outcomes(1, 43, "pending", "never left")
    metrics.outcomes(1, 43, "expired", NOT_SENT)
    for seconds in (0.2, 0.3, 15.0):
        metrics.request(seconds)
    metrics.insert_to_accepted(0.7)
    metrics.accepted_to_delivered(12.0)
    metrics.rescued(5)
    metrics.report("delivered", matched=True)
    metrics.report("delivered", matched=False)
    metrics.report(None, matched=False)
    metrics.refused("wrong token")
    metrics.observe(in_flight=lambda: 7, lag=lambda: 0.25)
    return metrics


def test_outcomes_and_requests_are_counted_apart() -> None:
    """An outcome counts for its service; only what was asked of the provider is a request."""
    families = parse(busy().render([]))
    assert values(families["dispatcher_messages"]) == {
        ("accepted", "42"): 2,
        ("expired", "43"): 1,
        ("pending", "43"): 1,
        ("unknown", "42"): 1,
    }
    assert values(families["dispatcher_requests"]) == {
        ("MSG_OK",): 2,
        ("in doubt",): 1,
        ("never left",): 1,
    }


@pytest.mark.parametrize(
    ("name", "count", "total"),
    [
        ("dispatcher_request_seconds", 3, 15.5),
        ("dispatcher_insert_to_accepted_seconds", 1, 0.7),
        ("dispatcher_accepted_to_delivered_seconds", 1, 12.0),
    ],
)
def test_times_are_histograms(name: str, count: int, total: float) -> None:
    """Each wait is a histogram whose last bucket has all of them."""
    family = parse(busy().render([]))[name]
    samples = {(sample.name, sample.labels.get("le")): sample.value for sample in family.samples}
    assert family.type == "histogram"
    assert samples[f"{name}_bucket", "+Inf"] == samples[f"{name}_count", None] == count
    assert samples[f"{name}_sum", None] == pytest.approx(total)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dispatcher_in_flight", {(): 7.0}),
        ("dispatcher_writeback_lag_seconds", {(): 0.25}),
        ("dispatcher_rescued_workers", {(): 1.0}),
        ("dispatcher_rescued_messages", {(): 5.0}),
        ("dispatcher_reports", {("delivered",): 2.0, ("none",): 1.0}),
        ("dispatcher_reports_unmatched", {(): 2.0}),
        ("dispatcher_reports_refused", {("wrong token",): 1.0}),
        ("dispatcher_database_up", {(): 1.0}),
    ],
)
def test_what_was_told_is_shown(name: str, expected: dict[tuple[str, ...], float]) -> None:
    """Every count and every observed value is found under its name."""
    assert values(parse(busy().render([]))[name]) == expected


def test_the_database_tells_its_gauges_by_their_labels() -> None:
    """A sample of the database appears with the labels that its name has."""
    samples = [
        Sample("dispatcher_pending", ("42",), 3.0),
        Sample("dispatcher_quota_used", ("42", "day"), 9.0),
        Sample("dispatcher_reports_waiting", (), 1.0),
    ]
    families = parse(Metrics().render(samples))
    assert values(families["dispatcher_pending"]) == {("42",): 3.0}
    assert families["dispatcher_quota_used"].samples[0].labels == {"service": "42", "period": "day"}
    assert values(families["dispatcher_reports_waiting"]) == {(): 1.0}


def test_without_a_database_the_process_still_answers() -> None:
    """Counters are shown, gauges of the database are absent, and that it is away is said."""
    families = parse(busy().render(None))
    assert values(families["dispatcher_database_up"]) == {(): 0.0}
    assert not families.keys() & GAUGES.keys()
    assert values(families["dispatcher_messages"])["accepted", "42"] == 2


def test_names_helps_and_labels_keep_to_the_rules() -> None:
    """Each family has a help, our prefix and no label that could hold a number or an identifier."""
    samples = [Sample(name, ("x",) * len(family.labels), 1) for name, family in GAUGES.items()]
    families = parse(busy().render(samples))
    assert GAUGES.keys() <= families.keys()
    for family in families.values():
        assert family.name.startswith(("dispatcher_", "process_"))
        assert family.documentation.endswith(".")
        assert {label for sample in family.samples for label in sample.labels} <= LABELS
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)


def test_the_process_itself_is_measured() -> None:
    """Memory, time and open files of the process are shown too."""
    families = parse(Metrics().render(None))
    assert values(families["process_resident_memory_bytes"])[()] > 1e6
    assert values(families["process_open_fds"])[()] > 0
