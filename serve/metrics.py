"""Prometheus metrics: what the API counts itself, and the engines' own counts of every replica."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from serve.model import Snapshot
from sharegpt4v.engine.stats import SECONDS_BOUNDS, Seconds

_LABELS = ["model", "replica"]

COUNTERS = {
    "requests": "requests finished by the engine",
    "failed": "requests failed in the engine",
    "cancelled": "requests cancelled because their client left",
    "new_tokens": "tokens generated",
    "slot_steps": "decode steps times slots",
    "live_steps": "decode steps times slots that generated; over slot_steps it is the slot use",
}
GAUGES = {"running": "requests in slots", "queued": "requests that wait for a slot", "slots": "slots"}


class ApiMetrics:
    """Counts what the API sees. One for each app: several may live in one process, in tests for one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sharegpt4v_http_requests",
            "answers by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.errors = Counter(
            "sharegpt4v_http_errors", "errors by their code", ["code"], registry=self.registry
        )
        self.in_flight = Gauge("sharegpt4v_http_in_flight", "requests in progress", registry=self.registry)
        self.first_token = Histogram(
            "sharegpt4v_http_first_token_seconds",
            "from the end of a request's body to the first text of its answer",
            ["model"],
            buckets=SECONDS_BOUNDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "sharegpt4v_http_request_seconds",
            "from a request's arrival to the end of its answer",
            ["route"],
            buckets=SECONDS_BOUNDS,
            registry=self.registry,
        )
        self.verdicts = Counter(
            "sharegpt4v_captions", "captions by the gate's verdict", ["verdict"], registry=self.registry
        )


Families = Sequence[Metric]
"""Metrics as prometheus_client collects them; they can be sent to another process."""


def metrics_page(snapshots: Sequence[Snapshot], api: Mapping[str, Families]) -> bytes:
    """Returns all metrics in Prometheus' text format. api: those of each replica's API, by its name."""
    registry = CollectorRegistry()
    registry.register(_Apis(api))
    registry.register(_Engines(snapshots))
    return bytes(generate_latest(registry))


class _Apis:
    """Collects what the APIs of all replicas count, each number with the replica it is of."""

    def __init__(self, api: Mapping[str, Families]) -> None:
        self._api = api

    def collect(self) -> Iterator[Metric]:
        joined: dict[str, Metric] = {}
        for replica, families in self._api.items():
            for family in families:
                known = joined.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type, family.unit)
                )
                for one in family.samples:
                    known.samples.append(one._replace(labels={**one.labels, "replica": replica}))
        yield from joined.values()


class _Engines:
    """Collects the snapshots' numbers, each with the model and the replica it is of."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"sharegpt4v_engine_{name}", text, labels=_LABELS)
            for one in self._snapshots:
                counter.add_metric([one.model, one.replica], getattr(one.stats, name))
            yield counter
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"sharegpt4v_engine_{name}", text, labels=_LABELS)
            for one in self._snapshots:
                gauge.add_metric([one.model, one.replica], getattr(one.stats, name))
            yield gauge
        for name, text in (
            ("prompt_tokens", "prompt tokens of finished requests"),
            ("cached_tokens", "prompt tokens that needed no prefill, the prefix hits"),
        ):
            counter = CounterMetricFamily(f"sharegpt4v_engine_{name}", text, labels=_LABELS)
            for one in self._snapshots:
                counter.add_metric([one.model, one.replica], getattr(one, name))
            yield counter
        for name, text in (
            ("first_token", "from submit to the first token"),
            ("next_token", "from each token to the next"),
        ):
            histogram = HistogramMetricFamily(f"sharegpt4v_engine_{name}_seconds", text, labels=_LABELS)
            for one in self._snapshots:
                seconds: Seconds = getattr(one.latencies, name)
                histogram.add_metric([one.model, one.replica], _buckets(seconds), seconds.sum)
            yield histogram


def _buckets(seconds: Seconds) -> list[tuple[str, float]]:
    """Returns cumulative counts by upper bound, as Prometheus wants them."""
    total, buckets = 0, []
    for bound, count in zip([*map(str, SECONDS_BOUNDS), "+Inf"], seconds.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
