"""Generated traces: seeded, and the same again for the same arguments."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vllm_hotswap.simulation.trace import Head, Trace, TracedModel, TracedRequest, TracedSwitching

Kind = Literal["poisson", "bursty", "burst", "agents"]
KINDS: tuple[Kind, ...] = get_args(Kind)

ON_PART = 0.2
"""Part of its time in which a bursty model gets requests, at 1 / `ON_PART` times its mean rate."""
ON_S = 5.0
"""Mean length of such a period."""

RAREST = 1e-3
"""Mean number of requests of a bursty model while the most popular one gets all that there are:
below this it gets none."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The properties of a generated trace."""

    kind: Kind = "poisson"
    models: int = 3
    requests: int = 300
    rate: float = 1.0
    """Requests per second of all models together; agents send as fast as they are served."""
    zipf: float = 1.0
    """The model of rank k gets a share of 1 / k^zipf; 0: all get the same."""
    agents: int = 4
    think_s: float = 0.05
    """Mean seconds from a response to an agent's next request."""
    prompt_tokens: float = 64
    """On average."""
    output_tokens: float = 32
    """On average."""
    seed: int = 0


def generate(shape: Shape, model: TracedModel, switching: TracedSwitching) -> Trace:
    """Return a trace of that shape; all models take their turn on the same terms."""
    chance = random.Random(shape.seed)  # noqa: S311  # generated requests are not secret
    aliases = names(shape.models)
    arrivals = itertools.islice(GENERATORS[shape.kind](shape, aliases, chance), shape.requests)
    requests = tuple(
        TracedRequest(
            id=number,
            model=arrival.model,
            arrived_s=None if arrival.arrived_s is None else round(arrival.arrived_s, 6),
            after=arrival.after,
            think_s=round(arrival.think_s, 6),
            prompt_tokens=_length(chance, shape.prompt_tokens),
            output_tokens=_length(chance, shape.output_tokens),
        )
        for number, arrival in enumerate(arrivals)
    )
    return Trace(Head(dict.fromkeys(aliases, model), aliases[0], switching), requests)


def names(count: int) -> list[str]:
    """`m00`, `m01` and so on."""
    width = len(str(count - 1))
    return [f"m{number:0{width}}" for number in range(count)]


@dataclass(frozen=True, slots=True)
class Arrival:
    model: str
    arrived_s: float | None = None
    after: int | None = None
    think_s: float = 0.0


def poisson(shape: Shape, aliases: list[str], chance: random.Random) -> Iterator[Arrival]:
    """Yield independent requests at a constant rate, for models by Zipf's law."""
    totals = list(itertools.accumulate(shares(len(aliases), shape.zipf)))
    now_s = 0.0
    while True:
        now_s += chance.expovariate(shape.rate)
        (alias,) = chance.choices(aliases, cum_weights=totals)
        yield Arrival(alias, now_s)


def bursty(shape: Shape, aliases: list[str], chance: random.Random) -> Iterator[Arrival]:
    """The same rates, but each model's requests come in bursts. A Poisson process is turned on and
    off at random, independently of other models' (a Markov-modulated one).
    """
    parts = shares(len(aliases), shape.zipf)
    sources = [
        _on_and_off(alias, shape.rate * part, chance)
        for alias, part in zip(aliases, parts, strict=True)
        if shape.requests * part > RAREST * parts[0]
    ]
    return heapq.merge(*sources, key=lambda arrival: arrival.arrived_s or 0.0)


def _on_and_off(alias: str, rate: float, chance: random.Random) -> Iterator[Arrival]:
    off_s = ON_S * (1 - ON_PART) / ON_PART
    begin_s = 0.0
    is_on = chance.random() < ON_PART
    while True:
        end_s = begin_s + chance.expovariate(1 / (ON_S if is_on else off_s))
        now_s = begin_s
        while is_on and (now_s := now_s + chance.expovariate(rate / ON_PART)) < end_s:
            yield Arrival(alias, now_s)
        begin_s, is_on = end_s, not is_on


def burst(shape: Shape, aliases: list[str], _: random.Random) -> Iterator[Arrival]:
    """Yield requests at even distances, one model after the other: the worst possible order."""
    for number in itertools.count():
        yield Arrival(aliases[number % len(aliases)], number / shape.rate)


def agents(shape: Shape, aliases: list[str], chance: random.Random) -> Iterator[Arrival]:
    """Let each agent continue, when it has its response, with the other of its two models."""
    pairs = [(number % len(aliases), (number + 1) % len(aliases)) for number in range(shape.agents)]
    for number in itertools.count():
        turn, agent = divmod(number, shape.agents)
        alias = aliases[pairs[agent][turn % 2]]
        if turn == 0:
            yield Arrival(alias, agent * shape.think_s)
        else:
            think_s = chance.expovariate(1 / shape.think_s) if shape.think_s else 0.0
            yield Arrival(alias, after=number - shape.agents, think_s=think_s)


GENERATORS: Mapping[Kind, Callable[[Shape, list[str], random.Random], Iterator[Arrival]]] = {
    "poisson": poisson,
    "bursty": bursty,
    "burst": burst,
    "agents": agents,
}


def shares(count: int, zipf: float) -> list[float]:
    """Each rank's share, by Zipf's law."""
    parts = [rank**-zipf for rank in range(1, count + 1)]
    total = math.fsum(parts)
    return [part / total for part in parts]


def _length(chance: random.Random, mean: float) -> int:
    """Return a geometrically distributed length of at least 1."""
    if mean <= 1:
        return 1
    return 1 + int(math.log(1.0 - chance.random()) / math.log(1.0 - 1.0 / mean))
