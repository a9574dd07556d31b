"""`/metrics`: vLLM's metrics of every model, and the metrics of switching.

A new `AsyncLLM` takes the metrics of earlier ones out of prometheus_client's global registry, so
vLLM alone would report only the last model. Here every model's logger makes its metrics through
`_Shared`, which keeps one collector per name in a registry of our own. Every metric of vLLM has a
`model_name` label already. HTTP metrics, which have none, get it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

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

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_WAIT_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_SWITCH_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120)


def exposition(registries: Iterable[CollectorRegistry]) -> bytes:
    """Return all in Prometheus' text format: `registries`, and the process's own."""
    parts = (*registries, REGISTRY)
    return b"".join(generate_latest(registry) for registry in parts)


class SwitchMetrics:
    """An observer that counts switches, phases and requests, in a registry of its own."""

    def __init__(
        self,
        active: Callable[[], str | None],
        epoch: Callable[[], int],
        in_flight: Callable[[], dict[str, int]],
        held_back: Callable[[], dict[str, int]],
        parked: Callable[[], dict[str, int]],
        waiting: Callable[[], dict[str, int]],
        is_ready: Callable[[], bool],
        held: Callable[[], dict[str, int]],
        waking: Callable[[], dict[str, int]],
        budget: Callable[[], int],
        job_leases: Callable[[], Mapping[str, int]],
        aliases: Iterable[str],
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._switches = Counter(
            "hotswap_switches",
            "Completed switches, by result.",
            ["target", "result"],
            registry=self.registry,
        )
        self._switch_seconds = Histogram(
            "hotswap_switch_duration_seconds",
            "Seconds from the switch call until requests are admitted again.",
            ["target"],
            buckets=_SWITCH_BUCKETS,
            registry=self.registry,
        )
        self._phase_seconds = Histogram(
            "hotswap_switch_phase_duration_seconds",
            "Seconds spent in each phase of a switch.",
            ["target", "phase"],
            buckets=_SWITCH_BUCKETS,
            registry=self.registry,
        )
        self._requests = Counter(
            "hotswap_requests",
            "Admitted requests, by outcome.",
            ["model", "result"],
            registry=self.registry,
        )
        self._loads = Counter(
            "hotswap_loads", "Engines created.", ["model"], registry=self.registry
        )
        epoch_gauge = Gauge(
            "hotswap_epoch", "Number of activations so far.", registry=self.registry
        )
        epoch_gauge.set_function(epoch)
        waiting_gauge = Gauge(
            "hotswap_requests_waiting",
            "Requests waiting for the model.",
            ["model"],
            registry=self.registry,
        )
        self._wait_seconds = Histogram(
            "hotswap_request_wait_seconds",
            "Seconds from the arrival of a request to its admission.",
            ["model"],
            buckets=_WAIT_BUCKETS,
            registry=self.registry,
        )
        active_gauge = Gauge(
            "hotswap_model_active", "1 for the active model.", ["model"], registry=self.registry
        )
        in_flight_gauge = Gauge(
            "hotswap_requests_in_flight",
            "Requests in flight on the model.",
            ["model"],
            registry=self.registry,
        )
        held_back_gauge = Gauge(
            "hotswap_requests_held_back",
            "Engine requests held back because their callers already use their share of the "
            "engine.",
            ["model"],
            registry=self.registry,
        )
        ready_gauge = Gauge(
            "hotswap_ready", "1 if requests are being served.", registry=self.registry
        )
        ready_gauge.set_function(lambda: float(is_ready()))
        parked_gauge = Gauge(
            "hotswap_requests_parked",
            "Requests parked with the model's engine.",
            ["model"],
            registry=self.registry,
        )
        refused = Counter(
            "hotswap_outputs_refused",
            "Requests aborted because an output belonged to another model or epoch.",
            ["model"],
            registry=self.registry,
        )
        evicted_clients = Counter(
            "hotswap_clients_evicted",
            "Requests aborted because the client stopped reading.",
            ["model"],
            registry=self.registry,
        )
        engine_failures = Counter(
            "hotswap_engine_failures",
            "Engines that died while the engine host kept running.",
            ["model"],
            registry=self.registry,
        )
        self._by_model: Mapping[type[Event], Counter] = {
            OutputRefused: refused,
            ClientEvicted: evicted_clients,
            EngineDied: engine_failures,
        }
        self._host_deaths = Counter(
            "hotswap_host_deaths", "Engine hosts that died or hung.", registry=self.registry
        )
        self._restarts = Counter(
            "hotswap_host_restarts", "Restarts of the engine host.", registry=self.registry
        )
        self._predictions = Counter(
            "hotswap_predictions",
            "Predictions of the next model, by whether they were right.",
            ["result"],
            registry=self.registry,
        )
        self._prefetched = Counter(
            "hotswap_prefetched_bytes",
            "Bytes read ahead for predictions and announcements, by whether they were used.",
            ["result"],
            registry=self.registry,
        )
        self._woken = Counter(
            "hotswap_woken_bytes",
            "Device memory that early wakes took, by outcome.",
            ["result"],
            registry=self.registry,
        )
        self._moves = Counter(
            "hotswap_moves",
            "Changes of residency.",
            ["model", "residency"],
            registry=self.registry,
        )
        held_gauge = Gauge(
            "hotswap_model_device_bytes",
            "Device memory that the model holds, as the budget counts it.",
            ["model"],
            registry=self.registry,
        )
        waking_gauge = Gauge(
            "hotswap_model_waking_bytes",
            "Device memory taken so far by an early wake of the model.",
            ["model"],
            registry=self.registry,
        )
        budget_gauge = Gauge(
            "hotswap_device_budget_bytes",
            "Device memory budget of all models together.",
            registry=self.registry,
        )
        budget_gauge.set_function(budget)
        job_leases_gauge = Gauge(
            "hotswap_job_leases",
            "Job leases on the model.",
            ["model"],
            registry=self.registry,
        )
        for alias in aliases:
            job_leases_gauge.labels(alias).set_function(partial(_item, job_leases, alias))
            waking_gauge.labels(alias).set_function(partial(_item, waking, alias))
            held_gauge.labels(alias).set_function(partial(_item, held, alias))
            active_gauge.labels(alias).set_function(partial(_is_equal, active, alias))
            parked_gauge.labels(alias).set_function(partial(_item, parked, alias))
            held_back_gauge.labels(alias).set_function(partial(_item, held_back, alias))
            in_flight_gauge.labels(alias).set_function(partial(_item, in_flight, alias))
            waiting_gauge.labels(alias).set_function(partial(_item, waiting, alias))

    def notify(self, event: Event) -> None:
        match event:
            case SwitchEnded(target=target, status=status, duration_s=seconds):
                self._switches.labels(target, status).inc()
                self._switch_seconds.labels(target).observe(seconds)
            case PhaseChanged(status="finished", target=target, phase=phase, duration_s=seconds):
                self._phase_seconds.labels(target, phase.value).observe(seconds)
            case RequestEnded():
                self._request_ended(event)
            case OutputRefused() | ClientEvicted() | EngineDied():
                self._by_model[type(event)].labels(event.model).inc()
            case HostDied():
                self._host_deaths.inc()
            case HostRestarted():
                self._restarts.inc()
            case PredictionSettled() | PrefetchSettled() | WakeChanged():
                self._count_lookahead(event)
            case ResidencyChanged(model=model, before=before, after=after):
                self._moves.labels(model, after.value).inc()
                if (before.value, after.value) == ("loading", "parked"):
                    self._loads.labels(model).inc()

    def _count_lookahead(self, event: PredictionSettled | PrefetchSettled | WakeChanged) -> None:
        if isinstance(event, PredictionSettled):
            self._predictions.labels("hit" if event.hit else "miss").inc()
        elif isinstance(event, WakeChanged):
            if event.change not in ("begun", "done"):
                result = "used" if event.change == "used" else "wasted"
                self._woken.labels(result).inc(event.done_bytes)
        else:
            result = "used" if event.used else "wasted"
            self._prefetched.labels(result).inc(event.prefetched_bytes)

    def _request_ended(self, event: RequestEnded) -> None:
        if event.service_s is not None or event.result not in ("cut", "left"):
            # Its model has answered, perhaps without its engine.
            self._requests.labels(event.model, event.result).inc()
        if event.service_s is not None:  # it has had its turn
            self._wait_seconds.labels(event.model).observe(event.waited_s)


def _is_equal(active: Callable[[], str | None], alias: str) -> float:
    return float(active() == alias)


def _item(counts: Callable[[], Mapping[str, int]], alias: str) -> float:
    return counts()[alias]
