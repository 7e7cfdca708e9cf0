"""What Prometheus sees: counters and histograms kept in the process, gauges from the database."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["CONTENT_TYPE", "GAUGES", "NOT_SENT", "Metrics", "Sample"]

# One more series for each counter, which only OpenMetrics reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library left it so

_REQUEST: Final = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30)
_WAIT: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 900, 3600, 21_600, 86_400)
_DELIVERY: Final = (1, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 300, 900, 3600, 21_600, 86_400)
"""Upper bounds of the histograms' buckets, in seconds."""

NOT_SENT: Final = "not sent"
"""In the place of an answer: the outcome took no request."""


@dataclass(frozen=True, slots=True)
class _Family:
    help: str
    labels: tuple[str, ...] = ()


GAUGES: Final[Mapping[str, _Family]] = {
    "dispatcher_pending": _Family("Messages that wait to be sent.", ("service",)),
    "dispatcher_sending": _Family("Messages that workers hold.", ("service",)),
    "dispatcher_in_doubt": _Family(
        "Messages in doubt: they may have been sent, and no usable answer came.", ("service",)
    ),
    "dispatcher_oldest_due_age_seconds": _Family(
        "For how long the oldest message that is due has been due; 0 if none is.", ("service",)
    ),
    "dispatcher_quota_used": _Family(
        "Messages counted in the current window.", ("service", "period")
    ),
    "dispatcher_quota_limit": _Family(
        "Messages allowed in a window; absent without a limit.", ("service", "period")
    ),
    "dispatcher_quota_closed": _Family(
        "1 while the provider's word is that the window is spent.", ("service", "period")
    ),
    "dispatcher_quota_next_window_timestamp_seconds": _Family(
        "When the next window begins, in seconds since 1970.", ("service", "period")
    ),
    "dispatcher_service_paused": _Family("1 while an operator has paused it.", ("service",)),
    "dispatcher_service_blocked": _Family(
        "1 while the provider's answers block it for every egress.", ("service",)
    ),
    "dispatcher_egress_service_blocked": _Family(
        "1 while the provider does not take the service from this egress.", ("egress", "service")
    ),
    "dispatcher_egress_banned": _Family("1 while its address is banned.", ("egress",)),
    "dispatcher_egress_ill": _Family(
        "1 while it is paused because the provider does not answer well.", ("egress",)
    ),
    "dispatcher_egress_probe_timestamp_seconds": _Family(
        "When the next probe of a closed egress is due, in seconds since 1970.", ("egress",)
    ),
    "dispatcher_workers": _Family("Workers within their lease.", ("egress",)),
    "dispatcher_reports_waiting": _Family(
        "Delivery reports of the last 7 days whose message is not known (yet)."
    ),
}
"""What the database is asked for at a scrape, by name."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One value for one of `GAUGES`; its labels in the order named there."""

    name: str
    labels: tuple[str, ...]
    value: float


class _FromDatabase(Collector):
    """The gauges of one scrape, None while the database is away."""

    def __init__(self, samples: Sequence[Sample] | None) -> None:
        self._samples = samples

    def collect(self) -> Iterable[GaugeMetricFamily]:
        yield GaugeMetricFamily(
            "dispatcher_database_up",
            "1 if the database answered; the gauges it tells are absent otherwise.",
            float(self._samples is not None),
        )
        if self._samples is None:
            return
        families = {
            name: GaugeMetricFamily(name, family.help, labels=family.labels)
            for name, family in GAUGES.items()
        }
        for sample in self._samples:
            families[sample.name].add_metric(sample.labels, sample.value)
        yield from families.values()


class _Histogram(Collector):
    """Durations by bucket.

    Two of the library's own took a fortieth of the worker's time, measured: each notes a value
    under a lock, after comparing it with one bound after the other.
    """

    def __init__(
        self, name: str, help_: str, bounds: tuple[float, ...], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._help = help_
        self._bounds = (*bounds, inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterable[HistogramMetricFamily]:
        bounds = map(floatToGoString, self._bounds)
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._help, buckets, self._sum)


class Metrics:
    """The counts of one process, cheap enough for the way of every message."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._messages = Counter(
            "dispatcher_messages",
            "Outcomes recorded, by the status they gave to the message.",
            ("service", "outcome"),
            registry=registry,
        )
        self._requests = Counter(
            "dispatcher_requests",
            "Requests to the provider, by its answer or the lack of one.",
            ("answer",),
            registry=registry,
        )
        self._request_seconds = _Histogram(
            "dispatcher_request_seconds",
            "From a request's first byte to its whole answer, or to giving up.",
            _REQUEST,
            registry,
        )
        self._insert_to_accepted = _Histogram(
            "dispatcher_insert_to_accepted_seconds",
            "From the insert of a message to the record that the provider accepted it.",
            _WAIT,
            registry,
        )
        self._accepted_to_delivered = _Histogram(
            "dispatcher_accepted_to_delivered_seconds",
            "From the record that the provider accepted a message to the report of its delivery.",
            _DELIVERY,
            registry,
        )
        self._in_flight = Gauge(
            "dispatcher_in_flight", "Requests under way from this process.", registry=registry
        )
        self._writeback_lag = Gauge(
            "dispatcher_writeback_lag_seconds",
            "Age of the oldest answer that is not recorded yet.",
            registry=registry,
        )
        self._rescued_workers = Counter(
            "dispatcher_rescued_workers",
            "Workers that were gone and whose messages this process took over.",
            registry=registry,
        )
        self._rescued_messages = Counter(
            "dispatcher_rescued_messages",
            "Messages in doubt because the worker that held them was gone.",
            registry=registry,
        )
        self._reports = Counter(
            "dispatcher_reports",
            "Delivery reports stored, by what they tell; 'none' for a word that is not known.",
            ("status",),
            registry=registry,
        )
        self._unmatched = Counter(
            "dispatcher_reports_unmatched",
            "Delivery reports whose message was not known when they came.",
            registry=registry,
        )
        self._refused = Counter(
            "dispatcher_reports_refused",
            "Delivery reports that were not taken.",
            ("reason",),
            registry=registry,
        )
        self._by_outcome: dict[tuple[int, str], Counter] = {}
        self._by_answer: dict[str, Counter] = {}
        self._by_report: dict[str | None, Counter] = {}

    def outcomes(self, messages: int, service_id: int, status: str, answer: str) -> None:
        """Count recorded outcomes that are alike, and their requests if they took one each.

        `answer`: the word answered, without an identifier, or 'in doubt' or 'never left', or
        `NOT_SENT` for outcomes that took no request.
        """
        try:
            message = self._by_outcome[service_id, status]
        except KeyError:
            message = self._messages.labels(str(service_id), status)
            self._by_outcome[service_id, status] = message
        message.inc(messages)
        if answer == NOT_SENT:
            return
        try:
            request = self._by_answer[answer]
        except KeyError:
            request = self._by_answer[answer] = self._requests.labels(answer)
        request.inc(messages)

    def request(self, seconds: float) -> None:
        """Note for how long a request was under way."""
        self._request_seconds.observe(seconds)

    def insert_to_accepted(self, seconds: float) -> None:
        """Note how long a message took from its insert to its acceptance."""
        self._insert_to_accepted.observe(seconds)

    def accepted_to_delivered(self, seconds: float) -> None:
        """Note how long a message took from its acceptance to the handset."""
        self._accepted_to_delivered.observe(seconds)

    def rescued(self, messages: int) -> None:
        """Count a worker that was gone, and the messages that were taken from it."""
        self._rescued_workers.inc()
        self._rescued_messages.inc(messages)

    def report(self, status: str | None, *, matched: bool) -> None:
        """Count a stored delivery report; `status` None for a word that is not known."""
        try:
            stored = self._by_report[status]
        except KeyError:
            stored = self._by_report[status] = self._reports.labels(status or "none")
        stored.inc()
        if not matched:
            self._unmatched.inc()

    def refused(self, reason: str) -> None:
        """Count a delivery report that was not taken."""
        self._refused.labels(reason).inc()

    def observe(self, *, in_flight: Callable[[], float], lag: Callable[[], float]) -> None:
        """Say what to ask at each scrape.

        `in_flight`: requests under way. `lag`: age in seconds of the oldest unrecorded answer.
        """
        self._in_flight.set_function(in_flight)
        self._writeback_lag.set_function(lag)

    def render(self, gauges: Sequence[Sample] | None) -> bytes:
        """Everything in Prometheus's text format; `gauges` None while the database is away."""
        return generate_latest(self._registry) + generate_latest(_FromDatabase(gauges))
