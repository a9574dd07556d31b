"""The policies that ship, and how one of somebody else's is found.

`fifo` serves requests strictly in the order of their arrival, whatever that costs: what to compare
with. `batch` serves a model's queue, and switches when the model is idle or when those who wait
have lost more than the switch would cost. `round_robin` gives each model a slice of time, and parks
what it has not finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.policy import (
    Decision,
    Policy,
    PolicyFactory,
    PolicySettings,
    QueueView,
    ServeOn,
    Snapshot,
    SwitchTo,
    WaitUntil,
)

GROUP = "vllm_hotswap.policies"
"""The group of entry points that name further policies."""

ROUND_TRIPS = 2
"""A model that is busy stays active for at least as many switches to the next one and back: no
more than a fifth of the time is spent on switching, as long as nobody is due."""


GAIN = 2.0
"""How much more a switch must gain than it costs. Simulated: less switches more, and waits longer;
more makes small queues wait."""

PARK_PART = 0.2
"""`batch` parks what runs where the way there and back takes no more than that part of the time
which a request takes: waiting for the last ones would leave the engine nearly empty for longer."""


def fifo(_settings: PolicySettings) -> Policy:
    """Strictly in the order of arrival."""

    def decide(snapshot: Snapshot) -> Decision:
        next_one = min(snapshot.others, key=lambda queue: queue.first)
        if snapshot.own is not None and snapshot.own.first < next_one.first:
            return ServeOn(before=next_one.first)
        return SwitchTo(next_one.alias)

    return decide


def batch(settings: PolicySettings) -> Policy:
    """Serve the queue of a model; switch when it is idle, or when that gains more than it costs.

    What runs is waited for, and parked where a switch takes next to nothing compared with that.
    """

    def decide(snapshot: Snapshot) -> Decision:
        best = _most_urgent(snapshot.others, snapshot.now_s)
        active = snapshot.active
        if active is None:
            return SwitchTo(best.alias)
        begin_s = active.since_s + settings.min_active_s
        is_preferred = best.priority > active.priority and (
            snapshot.own is None or best.priority > snapshot.own.priority
        )
        if not (snapshot.is_idle or is_preferred):
            begin_s = max(begin_s, _worth_it_s(snapshot, best))
        if begin_s > snapshot.now_s:
            return WaitUntil(begin_s)
        return SwitchTo(best.alias, park=_round_trip_s(best) <= PARK_PART * active.service_s)

    return decide


def _most_urgent(queues: Iterable[QueueView], now_s: float) -> QueueView:
    """Whose requests have waited longest, all together, for each second that they take, the switch
    included; then who came first.

    Requests served per second would keep the mean wait lowest if jobs were done one after the other
    (W. E. Smith, "Various optimizers for single-stage production", Naval Research Logistics
    Quarterly 3, 1956). That they count by how long they have waited costs nothing of the mean, and
    does not leave small queues behind.
    """
    best, best_priority, best_rate = None, 0, 0.0
    for queue in queues:  # a loop, because this is the better part of a decision
        waited_s = queue.requests * (now_s - queue.mean_arrival_s)
        rate = queue.weight * waited_s / (queue.switch_cost_s + queue.service_s + 1e-6)
        priority = queue.priority
        if best is None or priority > best_priority:
            is_better = True
        elif priority < best_priority or rate < best_rate:
            is_better = False
        else:
            is_better = rate > best_rate or queue.first < best.first
        if is_better:
            best, best_priority, best_rate = queue, priority, rate
    assert best is not None
    return best


def _worth_it_s(snapshot: Snapshot, queue: QueueView) -> float:
    """When those who wait will have lost `GAIN` times what the switch costs those who are served.

    That is when to stop renting and buy, if one does not know for how long one would rent (the ski
    rental problem): with a gain of 1 it never costs more than twice what the best choice in
    hindsight would have, with 2 not more than three times, and less on average.
    """
    active = snapshot.active
    assert active is not None
    round_trip_s = _round_trip_s(queue)
    users = active.in_flight + (snapshot.own.requests if snapshot.own else 0)
    cost_s = (round_trip_s + active.service_s) * max(1, users) * active.weight
    gained_s = queue.mean_arrival_s + GAIN * cost_s / (queue.weight * queue.requests)
    return max(gained_s, active.since_s + ROUND_TRIPS * round_trip_s)


def _round_trip_s(queue: QueueView) -> float:
    return queue.switch_cost_s + queue.back_cost_s


def round_robin(settings: PolicySettings) -> Policy:
    """A slice of time for each model in turn; what is not finished then is parked."""

    def decide(snapshot: Snapshot) -> Decision:
        active = snapshot.active
        position = -1 if active is None else active.position
        after = [queue for queue in snapshot.others if queue.position > position]
        next_one = min(after or snapshot.others, key=lambda queue: queue.position)
        if active is None or snapshot.is_idle:
            return SwitchTo(next_one.alias)
        end_s = active.since_s + settings.slice_s * active.weight
        return SwitchTo(next_one.alias, park=True) if end_s <= snapshot.now_s else WaitUntil(end_s)

    return decide


POLICIES: Mapping[str, PolicyFactory] = {"fifo": fifo, "batch": batch, "round_robin": round_robin}


def make_policy(name: str, settings: PolicySettings) -> Policy:
    """The policy of that name: one of `POLICIES`, or what an entry point names.

    Raises:
        ConfigError: there is none, or it cannot be made.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in POLICIES and name not in found:
        known = ", ".join([*POLICIES, *sorted(found)])
        raise ConfigError(
            f"switching.policy {name!r} is not known; known: {known}; a package adds one with an "
            f"entry point of the group {GROUP}"
        )
    if name in POLICIES:
        return POLICIES[name](settings)
    try:
        policy: Policy = found[name].load()(settings)
    except Exception as error:
        raise ConfigError(f"switching.policy {name!r} cannot be made: {one_line(error)}") from error
    return policy
