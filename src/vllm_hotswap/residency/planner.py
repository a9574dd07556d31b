"""Which models move down the residency ladder so that one can move up. Pure: values in and out.

The planner knows no clock, no engine and no request: a `MemorySnapshot` has all that it looks at. A
`Plan` has the moves to make, in order. The planner prefers the moves that cost least to undo: it
puts models to sleep before it drops their weights, and drops weights before it unloads. Among
models, the least recently used goes first. Moves that turn out to be unnecessary are undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from vllm_hotswap.errors import NoRoom
from vllm_hotswap.models import Footprint, Usage, total
from vllm_hotswap.states import LADDER, Residency, is_below

MIB = 1 << 20

EVICTIONS = (Residency.ASLEEP, Residency.DISCARDED, Residency.COLD)
"""Where an evicted model may go, the cheapest to undo first."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as the planner sees it."""

    alias: str
    residency: Residency
    footprint: Footprint
    pinned: bool = False
    in_flight: int = 0
    """Requests that would be lost below `asleep`."""
    last_used_s: float = 0.0
    up_s: Mapping[Residency, float] = field(default_factory=dict)
    """Seconds from each residency to `parked`; measured or estimated."""
    waking: Usage = Usage()
    """Memory that its early wake takes, besides what it holds asleep."""

    @property
    def held(self) -> Usage:
        return self.footprint.at(self.residency) + self.waking

    def needs(self) -> Usage:
        """Return what it holds at most on its way up; only reading weights takes its peak."""
        reads = self.residency is not Residency.ASLEEP
        return self.footprint.peak if reads else self.footprint.at(Residency.PARKED)

    def can_move_to(self, residency: Residency) -> bool:
        """Whether it may be evicted to that residency."""
        if self.pinned or self.residency not in LADDER or not is_below(residency, self.residency):
            return False
        if residency is not Residency.ASLEEP and self.in_flight:
            return False
        if residency is Residency.DISCARDED and self._is_quicker_from_cold():
            return False
        return residency is Residency.COLD or residency in self.footprint.usage

    def _is_quicker_from_cold(self) -> bool:
        """Whether a load is quicker than reading weights into the structure that was kept."""
        from_discarded = self.up_s.get(Residency.DISCARDED, 0.0)
        return from_discarded > self.up_s.get(Residency.COLD, from_discarded)


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """The server as the planner sees it. Budgets are for models alone."""

    models: tuple[ModelView, ...]
    budget: Usage

    def find(self, alias: str) -> ModelView:
        return next(model for model in self.models if model.alias == alias)

    @property
    def used(self) -> Usage:
        return total(model.held for model in self.models)

    def without_wakes(self, keep: str | None = None) -> MemorySnapshot:
        """Return the snapshot after all early wakes are given up, except that of `keep`."""
        models = (m if m.alias == keep else replace(m, waking=Usage()) for m in self.models)
        return replace(self, models=tuple(models))


@dataclass(frozen=True, slots=True)
class Move:
    """One model's change of residency."""

    alias: str
    before: Residency
    after: Residency
    frees: Usage
    """Negative where it takes memory."""
    cost_s: float
    """Seconds to come back from there (evictions), or to come up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves in the order in which to make them: evictions, then the target's own."""

    target: str
    evictions: tuple[Move, ...]
    bring_up: Move | None
    used_before: Usage
    used_peak: Usage
    used_after: Usage
    budget: Usage
    given_up: tuple[str, ...] = ()
    """Models whose early wakes are given up before anything moves."""

    @property
    def cost_s(self) -> float:
        """Estimated seconds to bring the target up."""
        return self.bring_up.cost_s if self.bring_up else 0.0


def make_plan(snapshot: MemorySnapshot, target: str, keep: Iterable[str] = ()) -> Plan:
    """Plan how to bring `target` up to `parked` without ever exceeding the budget.

    Early wakes of other models are given up before any model is evicted.

    Args:
        snapshot: all models and the budget.
        target: the alias to bring up.
        keep: aliases that must not be moved (the active one, if it has to stay active).

    Raises:
        NoRoom: no set of allowed evictions makes room; the message has the arithmetic.
    """
    others = tuple(m.alias for m in snapshot.models if m.waking != Usage() and m.alias != target)
    if not others:
        return _plan(snapshot, target, keep)
    with suppress(NoRoom):
        plan = _plan(snapshot, target, keep)
        if not plan.evictions:
            return plan
    plan = _plan(snapshot.without_wakes(target), target, keep)
    return replace(plan, used_before=snapshot.used, given_up=others)


def _plan(snapshot: MemorySnapshot, target: str, keep: Iterable[str]) -> Plan:
    model = snapshot.find(target)
    kept = {target, *keep}
    if model.residency in (Residency.PARKED, Residency.ACTIVE):
        used = snapshot.used
        return Plan(target, (), None, used, used, used, snapshot.budget)
    held = model.held
    room = _Room(
        candidates=tuple(m for m in _least_recently_used(snapshot.models) if m.alias not in kept),
        others=snapshot.used - held,
        held=held,
        need=model.needs(),
        budget=snapshot.budget,
    )
    moves = _evictions(room)
    if moves is None:
        raise NoRoom(_arithmetic(snapshot, model, kept))
    rest, parked = room.rest(moves), model.footprint.at(Residency.PARKED)
    return Plan(
        target=target,
        evictions=tuple(_eviction(snapshot.find(alias), after) for alias, after in moves.items()),
        bring_up=_bring_up(model, parked),
        used_before=snapshot.used,
        used_peak=rest + room.need,
        used_after=rest + parked,
        budget=snapshot.budget,
    )


def relief(snapshot: MemorySnapshot, keep: Iterable[str] = ()) -> tuple[Move, ...]:
    """Return moves down for models that hold more than the budget together, after it has shrunk.

    If no moves suffice, all that help are returned.

    Args:
        snapshot: all models and the budget.
        keep: aliases that must not be moved (the active one).
    """
    kept = set(keep)
    room = _Room(
        candidates=tuple(m for m in _least_recently_used(snapshot.models) if m.alias not in kept),
        others=snapshot.used,
        held=Usage(),
        need=Usage(),
        budget=snapshot.budget,
    )
    moves = _descents(room)
    if room.suffices(moves):
        moves = _needed(room, moves)
    ordered = _in_order(room, moves)
    return tuple(_eviction(snapshot.find(alias), after) for alias, after in ordered.items())


def fits_together(views: Sequence[ModelView], budget: Usage) -> bool:
    """Whether all models may be parked at once, with one of them still to come up."""
    parked = total(view.footprint.at(Residency.PARKED) for view in views)
    rises = [view.footprint.peak - view.footprint.at(Residency.PARKED) for view in views]
    rise = Usage(
        max((rise.device for rise in rises), default=0),
        max((rise.host for rise in rises), default=0),
    )
    return (parked + rise).fits(budget)


@dataclass(frozen=True, slots=True)
class _Room:
    """What needs room, and which models may make it. Moves are residencies by alias."""

    candidates: tuple[ModelView, ...]
    """The least recently used first."""
    others: Usage
    """What all models but the target hold now."""
    held: Usage
    """What the target holds until it comes up."""
    need: Usage
    """What the target holds at most while it comes up."""
    budget: Usage

    def rest(self, moves: Mapping[str, Residency]) -> Usage:
        """Return what all models but the target hold after `moves`."""
        moved = [model for model in self.candidates if model.alias in moves]
        return self.others - total(_freed(model, moves[model.alias]) for model in moved)

    def can_make(self, moves: Mapping[str, Residency]) -> bool:
        """Whether host memory has room for what is put to sleep, with the target where it is."""
        return (self.rest(moves) + self.held).host <= self.budget.host

    def suffices(self, moves: Mapping[str, Residency]) -> bool:
        """Whether the target can come up after `moves`."""
        return self.can_make(moves) and (self.rest(moves) + self.need).fits(self.budget)


def _evictions(room: _Room) -> dict[str, Residency] | None:
    """Return where candidates go, in order; None if even that makes no room."""
    moves = _descents(room)
    return _in_order(room, _needed(room, moves)) if room.suffices(moves) else None


def _descents(room: _Room) -> dict[str, Residency]:
    """Return moves, added one by one until they suffice or no model can go lower."""
    moves: dict[str, Residency] = {}
    # Once more at the end: unloading frees host memory that others may need in order to sleep.
    for limit in (*EVICTIONS, Residency.COLD):
        for model in room.candidates:
            if room.suffices(moves):
                break
            moves = _with_move(room, moves, model, limit)
    return moves


def _with_move(
    room: _Room, moves: dict[str, Residency], model: ModelView, limit: Residency
) -> dict[str, Residency]:
    """Add a move of the model as low as it may go, not below `limit`, if that frees anything."""
    after = _lowest(model, limit)
    gain = model.footprint.at(moves.get(model.alias, model.residency)) - model.footprint.at(after)
    moved = {**moves, model.alias: after}
    frees = gain.device > 0 or gain.host > 0
    return moved if frees and (gain.host >= 0 or room.can_make(moved)) else moves


def _needed(room: _Room, moves: dict[str, Residency]) -> dict[str, Residency]:
    """Return the moves without those that turned out to be unnecessary.

    Moves are undone, the most recently used model's first and as far as possible, until none can
    be undone: a model that goes back up may leave host memory to another.
    """
    for model in reversed(room.candidates):
        for trial in _milder(model, moves):
            if room.suffices(trial):
                return _needed(room, trial)
    return moves


def _milder(model: ModelView, moves: dict[str, Residency]) -> Iterator[dict[str, Residency]]:
    """Yield the moves with one model staying, or going less far down."""
    if model.alias in moves:
        yield {alias: after for alias, after in moves.items() if alias != model.alias}
        for after in EVICTIONS:
            if is_below(moves[model.alias], after) and model.can_move_to(after):
                yield {**moves, model.alias: after}


def _in_order(room: _Room, moves: dict[str, Residency]) -> dict[str, Residency]:
    """Order moves: what frees most host memory first, what takes most last; then least recent."""
    movers = [model for model in room.candidates if model.alias in moves]
    movers.sort(key=lambda model: -_freed(model, moves[model.alias]).host)
    return {model.alias: moves[model.alias] for model in movers}


def _freed(model: ModelView, after: Residency) -> Usage:
    return model.footprint.at(model.residency) - model.footprint.at(after)


def _lowest(model: ModelView, limit: Residency = Residency.COLD) -> Residency:
    """Return the lowest residency, not below `limit`, that it may be evicted to, or its own."""
    allowed = [r for r in EVICTIONS if not is_below(r, limit) and model.can_move_to(r)]
    return allowed[-1] if allowed else model.residency


def _least_recently_used(models: Iterable[ModelView]) -> list[ModelView]:
    return sorted(models, key=lambda model: (model.last_used_s, model.alias))


def _eviction(model: ModelView, after: Residency) -> Move:
    cost_s = model.up_s.get(after, 0.0)
    return Move(model.alias, model.residency, after, _freed(model, after), cost_s)


def _bring_up(model: ModelView, parked: Usage) -> Move:
    frees = model.held - parked
    cost_s = model.up_s.get(model.residency, 0.0)
    return Move(model.alias, model.residency, Residency.PARKED, frees, cost_s)


def _arithmetic(snapshot: MemorySnapshot, target: ModelView, kept: set[str]) -> str:
    parts = [f"{target.alias!r} needs {_sizes(target.needs())}"]
    for model in snapshot.models:
        if model.alias == target.alias or model.residency in (Residency.COLD, Residency.FAILED):
            continue
        held = model.footprint.at(model.residency if model.alias in kept else _lowest(model))
        if held.device or held.host:
            parts.append(f"{model.alias!r} keeps {_sizes(held)} ({_why(model, kept)})")
    return f"no room: {'; '.join(parts)}; the budget for models is {_sizes(snapshot.budget)}"


def _why(model: ModelView, kept: set[str]) -> str:
    if model.pinned:
        return "pinned"
    if model.alias in kept:
        return "active" if model.residency is Residency.ACTIVE else "in use"
    if model.in_flight:
        return f"{model.in_flight} requests in flight"
    return model.residency.value


def _sizes(usage: Usage) -> str:
    text = f"{usage.device / MIB:.1f} MiB"
    return f"{text} of device and {usage.host / MIB:.1f} MiB of host memory" if usage.host else text
