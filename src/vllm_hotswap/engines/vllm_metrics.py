"""vLLM's metrics of several models in one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_vllm_registry = CollectorRegistry(auto_describe=True)


class _Shared:
    """Makes a metric, or finds the one with that name that another model's logger made."""

    def __init__(self, kind: type[Any]) -> None:
        self._kind = kind
        self._made: dict[str, Any] = {}

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name not in self._made:
            self._made[name] = self._kind(name, *args, **kwargs, registry=_vllm_registry)
        return self._made[name]


_shared_gauge, _shared_counter, _shared_histogram = (
    _Shared(Gauge),
    _Shared(Counter),
    _Shared(Histogram),
)


_HOOKS = {
    "_gauge_cls": _shared_gauge,
    "_counter_cls": _shared_counter,
    "_histogram_cls": _shared_histogram,
}


def shared_stat_logger() -> type[Any]:
    """Return vLLM's Prometheus logger, with metrics that several models of a process share."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class SharedPrometheusStatLogger(PrometheusStatLogger):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with _keeping_registered("vllm:"):
                super().__init__(*args, **kwargs)

    _hook(SharedPrometheusStatLogger)
    # Helpers (speculative decoding, KV and encoder connectors, MFU) are classes with hooks too.
    for name in [n for n in dir(PrometheusStatLogger) if n.endswith("_cls")]:
        helper = getattr(PrometheusStatLogger, name)
        if name not in _HOOKS:
            shared = type(f"Shared{helper.__name__}", (helper,), {})
            _hook(shared)
            setattr(SharedPrometheusStatLogger, name, shared)
    return SharedPrometheusStatLogger


def _hook(logger: type[Any]) -> None:
    for name, shared in _HOOKS.items():
        if hasattr(logger, name):
            # staticmethod: a plain function or object set on a class must not be bound.
            setattr(logger, name, staticmethod(shared))


@contextmanager
def _keeping_registered(prefix: str) -> Iterator[None]:
    """Put back the collectors that vLLM takes out of the global registry inside this context."""
    before = _registered(prefix)
    try:
        yield
    finally:
        now = _registered(prefix)
        for collector in before:
            if collector not in now:
                REGISTRY.register(collector)


def _registered(prefix: str) -> list[Any]:
    return [c for c in list(REGISTRY._collector_to_names) if _name(c).startswith(prefix)]


def _name(collector: Any) -> str:
    return str(getattr(collector, "_name", ""))


class _ByModel(Collector):
    """The HTTP metrics of every model's application, with the label `model_name` added."""

    def __init__(self) -> None:
        self._collectors: list[tuple[str, Collector]] = []

    def add(self, alias: str, collector: Collector) -> None:
        self._collectors.append((alias, collector))

    def forget(self, alias: str) -> None:
        self._collectors = [(name, each) for name, each in self._collectors if name != alias]

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for alias, collector in self._collectors:
            for family in collector.collect():
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "model_name": alias}
                    merged.samples.append(sample._replace(labels=labels))
        return families.values()


_by_model = _ByModel()


_http_registry = CollectorRegistry()
_http_registry.register(_by_model)

VLLM_REGISTRIES = (_vllm_registry, _http_registry)
"""What vLLM has counted of all models: its engines, and its applications."""


@contextmanager
def adopting_frontend_metrics(alias: str) -> Iterator[None]:
    """Move the HTTP metrics that an application registers globally inside here to its alias.

    In the global registry, the next application's would collide with them and be dropped.
    """
    yield
    for collector in _registered("http_"):
        REGISTRY.unregister(collector)
        _by_model.add(alias, collector)


def forget_frontend_metrics(alias: str) -> None:
    """Drop the HTTP metrics of an application that will be made again: they start again at 0."""
    _by_model.forget(alias)


@contextmanager
def without_frontend_metrics() -> Iterator[None]:
    """Drop the HTTP metrics that an application registers globally inside here."""
    yield
    for collector in _registered("http_"):
        REGISTRY.unregister(collector)
