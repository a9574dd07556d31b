"""The server's own metrics: their names are public."""

from __future__ import annotations

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.switching.coordinator import Coordinator
from vllm_hotswap.switching.snapshot import ServerSnapshot
from vllm_hotswap.telemetry.metrics import COUNTERS, HISTOGRAMS, MODEL_GAUGES, SERVER_GAUGES
from vllm_hotswap.testing.fake_host import FakeHost

BY_MODEL, BY_RESULT = ("model",), ("result",)

PUBLIC = {
    "hotswap_switches": (
        "counter",
        ("target", "result"),
        "Completed switches, by result.",
    ),
    "hotswap_switch_duration_seconds": (
        "histogram",
        ("target",),
        "Seconds from the switch call until requests are admitted again.",
    ),
    "hotswap_switch_phase_duration_seconds": (
        "histogram",
        ("target", "phase"),
        "Seconds spent in each phase of a switch.",
    ),
    "hotswap_requests": ("counter", ("model", "result"), "Admitted requests, by outcome."),
    "hotswap_loads": ("counter", BY_MODEL, "Engines created."),
    "hotswap_epoch": ("gauge", (), "Number of activations so far."),
    "hotswap_requests_waiting": ("gauge", BY_MODEL, "Requests waiting for the model."),
    "hotswap_request_wait_seconds": (
        "histogram",
        BY_MODEL,
        "Seconds from the arrival of a request to its admission.",
    ),
    "hotswap_model_active": ("gauge", BY_MODEL, "1 for the active model."),
    "hotswap_requests_in_flight": ("gauge", BY_MODEL, "Requests in flight on the model."),
    "hotswap_requests_held_back": (
        "gauge",
        BY_MODEL,
        "Engine requests held back because their callers already use their share of the engine.",
    ),
    "hotswap_ready": ("gauge", (), "1 if requests are being served."),
    "hotswap_requests_parked": ("gauge", BY_MODEL, "Requests parked with the model's engine."),
    "hotswap_outputs_refused": (
        "counter",
        BY_MODEL,
        "Requests aborted because an output belonged to another model or epoch.",
    ),
    "hotswap_clients_evicted": (
        "counter",
        BY_MODEL,
        "Requests aborted because the client stopped reading.",
    ),
    "hotswap_engine_failures": (
        "counter",
        BY_MODEL,
        "Engines that died while the engine host kept running.",
    ),
    "hotswap_host_deaths": ("counter", (), "Engine hosts that died or hung."),
    "hotswap_host_restarts": ("counter", (), "Restarts of the engine host."),
    "hotswap_predictions": (
        "counter",
        BY_RESULT,
        "Predictions of the next model, by whether they were right.",
    ),
    "hotswap_prefetched_bytes": (
        "counter",
        BY_RESULT,
        "Bytes read ahead for predictions and announcements, by whether they were used.",
    ),
    "hotswap_woken_bytes": (
        "counter",
        BY_RESULT,
        "Device memory that early wakes took, by outcome.",
    ),
    "hotswap_moves": ("counter", ("model", "residency"), "Changes of residency."),
    "hotswap_model_device_bytes": (
        "gauge",
        BY_MODEL,
        "Device memory that the model holds, as the budget counts it.",
    ),
    "hotswap_model_waking_bytes": (
        "gauge",
        BY_MODEL,
        "Device memory taken so far by an early wake of the model.",
    ),
    "hotswap_device_budget_bytes": (
        "gauge",
        (),
        "Device memory budget of all models together.",
    ),
    "hotswap_job_leases": ("gauge", BY_MODEL, "Job leases on the model."),
}
"""Every metric: its type, its labels and its help. Dashboards and alerts rely on all of it."""

KINDS = {
    "counter": COUNTERS,
    "histogram": HISTOGRAMS,
    "gauge": (*SERVER_GAUGES, *MODEL_GAUGES),
}


def test_metrics_are_the_public_ones() -> None:
    """The tables declare the metrics that are public, with their labels and help, and no others."""
    declared = {
        metric.name: (kind, metric.labels, metric.help)
        for kind, metrics in KINDS.items()
        for metric in metrics
    }

    assert PUBLIC == declared


async def test_metrics_are_exposed_as_they_are_declared(server: Server) -> None:
    """The exposition has every metric with its type and its help, and each gauge's labels."""
    families = {family.name: family for family in server.app.metrics.registry.collect()}
    labels = {
        name: {tuple(sample.labels) for sample in family.samples}
        for name, family in families.items()
        if family.type == "gauge"
    }

    assert {name: (kind, text) for name, (kind, _, text) in PUBLIC.items()} == {
        name: (family.type, family.documentation) for name, family in families.items()
    }
    assert labels == {name: {names} for name, (kind, names, _) in PUBLIC.items() if kind == "gauge"}


async def test_every_model_has_gauges_in_the_order_of_the_configuration(server: Server) -> None:
    """A gauge of models has a value for each of them, also for one that was never loaded."""
    registry = server.app.metrics.registry.restricted_registry(["hotswap_model_active"])
    (family,) = registry.collect()

    values = [(sample.labels["model"], sample.value) for sample in family.samples]

    assert [("llama", 1.0), ("qwen", 0.0), ("mistral", 0.0)] == values


def test_metrics_are_known_before_the_host_has_started() -> None:
    """The metrics can be made before there is anything to take a snapshot of."""
    app = HotswapApp(FakeHost(("llama",)), Access())

    assert app.metrics.registry is not None


async def test_only_those_who_ask_for_a_snapshot_take_one(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape takes one snapshot, so does the status; requests and health checks take none."""
    taken = []
    take = Coordinator.snapshot

    def counted(coordinator: Coordinator) -> ServerSnapshot:
        taken.append(take(coordinator))
        return taken[-1]

    monkeypatch.setattr(Coordinator, "snapshot", counted)
    server = await make_server()
    counts = []
    for path in ("/ready", "/health", "/v1/models", "/metrics", "/admin/status"):
        await server.ask("llama")
        assert 200 == (await server.get(path)).status_code
        counts.append(len(taken))

    assert [0, 0, 0, 1, 2] == counts
