"""The workloads: three traces, each the same for every server that it is played on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.auto.checkpoints import GREETINGS
from vllm_hotswap.simulation.generate import Kind, Shape, generate
from vllm_hotswap.simulation.trace import Head, Trace, TracedModel, TracedSwitching

AT_ONCE = 1e6
"""Requests per second."""

AGENTS = 8
THINK_S = 0.05
ZIPF = 1.0
SEED = 6

LEAST_TOKENS = 8
"""Within these tokens, a model has said its name."""
MEAN_MORE_TOKENS = 8
MOST_TOKENS = 48

WORKLOADS: Mapping[str, Kind] = {"burst": "burst", "agents": "agents", "zipf": "poisson"}
"""Name of a trace -> how it is generated."""

WARM_UP = [alias for alias in reversed(GREETINGS) for _ in range(6)]
"""The models that get one request after the other before each trace. After that, the server's
memory of how long requests take is of these requests, and the trace's first model is active."""
WARM_UP_TOKENS = LEAST_TOKENS + MEAN_MORE_TOKENS

PROMPTS = ("Hello", "Who are you?", "What is the weather in Paris?", "Tell me a story")


@dataclass(frozen=True, slots=True)
class Amount:
    """How much to send."""

    requests: int
    """Requests of each trace."""
    rate: float
    """Requests per second of the Zipf trace."""


def workload(name: str, amount: Amount, switching: TracedSwitching) -> Trace:
    """Return the trace of that name."""
    kind = WORKLOADS[name]
    shape = Shape(
        kind=kind,
        models=len(GREETINGS),
        requests=amount.requests,
        rate=AT_ONCE if kind == "burst" else amount.rate,
        zipf=ZIPF,
        agents=AGENTS,
        think_s=THINK_S,
        output_tokens=MEAN_MORE_TOKENS,
        seed=SEED,
    )
    return _named(generate(shape, TracedModel(), switching))


def _named(trace: Trace) -> Trace:
    """Return the trace for the existing models, with answers long enough to say their names."""
    aliases = dict(zip(trace.head.models, GREETINGS, strict=True))
    models = {aliases[name]: terms for name, terms in trace.head.models.items()}
    requests = tuple(
        replace(
            request,
            model=aliases[request.model],
            prompt_tokens=len(prompt(request.id).split()) + 1,  # about
            output_tokens=min(LEAST_TOKENS + request.output_tokens, MOST_TOKENS),
        )
        for request in trace.requests
    )
    return Trace(Head(models, next(iter(models)), trace.head.switching), requests)


def prompt(number: int) -> str:
    """Return the prompt of the request with that number."""
    return PROMPTS[number % len(PROMPTS)]
