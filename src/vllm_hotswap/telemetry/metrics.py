"""`/metrics`: vLLM's metrics of every model, and the metrics of switching.

A new `AsyncLLM` takes the metrics of earlier ones out of prometheus_client's global registry, so
vLLM alone would report only the last model. Here every model's logger makes its metrics through
`_Shared`, which keeps one collector per name in a registry of our own. Every metric of vLLM has a
`model_name` label already. HTTP metrics, which have none, get it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from vllm_hotswap.events import (
    ClientEvicted,
    EngineDied,
    Event,
    HostDied,
    HostRestarted,
    OutputRefused,
    PhaseChanged,
    PredictionSettled,
    PrefetchSettled,
    RequestEnded,
    ResidencyChanged,
    SwitchEnded,
    WakeChanged,
)

if TYPE_CHECKING:  # the quickstart, too, uses this folder, and needs no coordinator
    from vllm_hotswap.switching import ModelSnapshot, ServerSnapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_WAIT_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_SWITCH_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120)


def exposition(registries: Iterable[CollectorRegistry]) -> bytes:
    """Return all in Prometheus' text format: `registries`, and the process's own."""
    parts = (*registries, REGISTRY)
    return b"".join(generate_latest(registry) for registry in parts)


@dataclass(frozen=True, slots=True)
class Metric:
    """The declaration of a metric that counts events; a histogram if it has buckets."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerGauge:
    """The declaration of a gauge with one value, taken from a snapshot."""

    name: str
    help: str
    value: Callable[[ServerSnapshot], float]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelGauge:
    """The declaration of a gauge with a value for each model."""

    name: str
    help: str
    value: Callable[[ModelSnapshot], float]
    labels: tuple[str, ...] = ("model",)


SWITCHES = Metric("hotswap_switches", "Completed switches, by result.", ("target", "result"))
SWITCH_SECONDS = Metric(
    "hotswap_switch_duration_seconds",
    "Seconds from the switch call until requests are admitted again.",
    ("target",),
    _SWITCH_BUCKETS,
)
PHASE_SECONDS = Metric(
    "hotswap_switch_phase_duration_seconds",
    "Seconds spent in each phase of a switch.",
    ("target", "phase"),
    _SWITCH_BUCKETS,
)
REQUESTS = Metric("hotswap_requests", "Admitted requests, by outcome.", ("model", "result"))
WAIT_SECONDS = Metric(
    "hotswap_request_wait_seconds",
    "Seconds from the arrival of a request to its admission.",
    ("model",),
    _WAIT_BUCKETS,
)
LOADS = Metric("hotswap_loads", "Engines created.", ("model",))
MOVES = Metric("hotswap_moves", "Changes of residency.", ("model", "residency"))
OUTPUTS_REFUSED = Metric(
    "hotswap_outputs_refused",
    "Requests aborted because an output belonged to another model or epoch.",
    ("model",),
)
CLIENTS_EVICTED = Metric(
    "hotswap_clients_evicted",
    "Requests aborted because the client stopped reading.",
    ("model",),
)
ENGINE_FAILURES = Metric(
    "hotswap_engine_failures",
    "Engines that died while the engine host kept running.",
    ("model",),
)
HOST_DEATHS = Metric("hotswap_host_deaths", "Engine hosts that died or hung.")
HOST_RESTARTS = Metric("hotswap_host_restarts", "Restarts of the engine host.")
PREDICTIONS = Metric(
    "hotswap_predictions",
    "Predictions of the next model, by whether they were right.",
    ("result",),
)
PREFETCHED_BYTES = Metric(
    "hotswap_prefetched_bytes",
    "Bytes read ahead for predictions and announcements, by whether they were used.",
    ("result",),
)
WOKEN_BYTES = Metric(
    "hotswap_woken_bytes", "Device memory that early wakes took, by outcome.", ("result",)
)

COUNTERS = (
    SWITCHES,
    REQUESTS,
    LOADS,
    MOVES,
    OUTPUTS_REFUSED,
    CLIENTS_EVICTED,
    ENGINE_FAILURES,
    HOST_DEATHS,
    HOST_RESTARTS,
    PREDICTIONS,
    PREFETCHED_BYTES,
    WOKEN_BYTES,
)
HISTOGRAMS = (SWITCH_SECONDS, PHASE_SECONDS, WAIT_SECONDS)
SERVER_GAUGES = (
    ServerGauge(
        "hotswap_epoch", "Number of activations so far.", lambda server: server.serving.epoch
    ),
    ServerGauge(
        "hotswap_ready",
        "1 if requests are being served.",
        lambda server: server.serving.is_ready,
    ),
    ServerGauge(
        "hotswap_device_budget_bytes",
        "Device memory budget of all models together.",
        lambda server: server.memory.budget.device,
    ),
)
MODEL_GAUGES = (
    ModelGauge("hotswap_model_active", "1 for the active model.", lambda model: model.is_active),
    ModelGauge(
        "hotswap_requests_in_flight",
        "Requests in flight on the model.",
        lambda model: model.in_flight,
    ),
    ModelGauge(
        "hotswap_requests_held_back",
        "Engine requests held back because their callers already use their share of the engine.",
        lambda model: model.held_back,
    ),
    ModelGauge(
        "hotswap_requests_parked",
        "Requests parked with the model's engine.",
        lambda model: model.parked,
    ),
    ModelGauge(
        "hotswap_requests_waiting",
        "Requests waiting for the model.",
        lambda model: model.waiting,
    ),
    ModelGauge(
        "hotswap_model_device_bytes",
        "Device memory that the model holds, as the budget counts it.",
        lambda model: model.held.device,
    ),
    ModelGauge(
        "hotswap_model_waking_bytes",
        "Device memory taken so far by an early wake of the model.",
        lambda model: model.waking.done_bytes if model.waking else 0,
    ),
    ModelGauge("hotswap_job_leases", "Job leases on the model.", lambda model: model.job_leases),
)

COUNTER_OF: Mapping[type[Event], Metric] = {
    OutputRefused: OUTPUTS_REFUSED,
    ClientEvicted: CLIENTS_EVICTED,
    EngineDied: ENGINE_FAILURES,
}
"""The counters of events about one model of which there is nothing else to count."""


class SnapshotCollector(Collector):
    """The gauges: each scrape takes one snapshot."""

    def __init__(self, snapshot: Callable[[], ServerSnapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges without values: before the start there is no snapshot."""
        for gauge in (*SERVER_GAUGES, *MODEL_GAUGES):
            yield _family(gauge)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        server = self._snapshot()
        for gauge in SERVER_GAUGES:
            family = _family(gauge)
            family.add_metric((), float(gauge.value(server)))
            yield family
        for of_model in MODEL_GAUGES:
            family = _family(of_model)
            for model in server.models:
                family.add_metric((model.alias,), float(of_model.value(model)))
            yield family


def _family(gauge: ServerGauge | ModelGauge) -> GaugeMetricFamily:
    return GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels)


class SwitchMetrics:
    """An observer that counts events, and the gauges of a snapshot, in a registry of its own."""

    def __init__(self, snapshot: Callable[[], ServerSnapshot]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(SnapshotCollector(snapshot))
        self._counters = {m: Counter(m.name, m.help, m.labels, registry=registry) for m in COUNTERS}
        self._histograms = {
            m: Histogram(m.name, m.help, m.labels, registry=registry, buckets=m.buckets)
            for m in HISTOGRAMS
        }

    def _count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        counter = self._counters[metric]
        (counter.labels(*labels) if labels else counter).inc(by)

    def _observe(self, metric: Metric, seconds: float, *labels: str) -> None:
        self._histograms[metric].labels(*labels).observe(seconds)

    def notify(self, event: Event) -> None:
        match event:
            case SwitchEnded(target=target, status=status, duration_s=seconds):
                self._count(SWITCHES, target, status)
                self._observe(SWITCH_SECONDS, seconds, target)
            case PhaseChanged(status="finished", target=target, phase=phase, duration_s=seconds):
                self._observe(PHASE_SECONDS, seconds, target, phase.value)
            case RequestEnded():
                self._request_ended(event)
            case OutputRefused() | ClientEvicted() | EngineDied():
                self._count(COUNTER_OF[type(event)], event.model)
            case HostDied():
                self._count(HOST_DEATHS)
            case HostRestarted():
                self._count(HOST_RESTARTS)
            case PredictionSettled() | PrefetchSettled() | WakeChanged():
                self._count_lookahead(event)
            case ResidencyChanged(model=model, before=before, after=after):
                self._count(MOVES, model, after.value)
                if (before.value, after.value) == ("loading", "parked"):
                    self._count(LOADS, model)

    def _count_lookahead(self, event: PredictionSettled | PrefetchSettled | WakeChanged) -> None:
        if isinstance(event, PredictionSettled):
            self._count(PREDICTIONS, "hit" if event.hit else "miss")
        elif isinstance(event, WakeChanged):
            if event.change not in ("begun", "done"):
                result = "used" if event.change == "used" else "wasted"
                self._count(WOKEN_BYTES, result, by=event.done_bytes)
        else:
            result = "used" if event.used else "wasted"
            self._count(PREFETCHED_BYTES, result, by=event.prefetched_bytes)

    def _request_ended(self, event: RequestEnded) -> None:
        if event.service_s is not None or event.result not in ("cut", "left"):
            # Its model has answered, perhaps without its engine.
            self._count(REQUESTS, event.model, event.result)
        if event.service_s is not None:  # it has had its turn
            self._observe(WAIT_SECONDS, event.waited_s, event.model)
