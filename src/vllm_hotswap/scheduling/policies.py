"""Built-in policies, and discovery of third-party ones.

`fifo` serves requests strictly in the order of arrival, whatever that costs: a baseline to compare
with. `batch` serves a model's queue, and switches when the model is idle, or when the requests that
wait have lost more than the switch would cost. `round_robin` gives each model a slice of time, and
parks the requests that it has not finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.scheduling.policy import (
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
"""The group of entry points that name additional policies."""

ROUND_TRIPS = 2
"""A busy model stays active for at least the time of so many switches to the next one and back. So
at most a fifth of the time is spent on switching, as long as no request is due."""


GAIN = 2.0
"""How many times its cost a switch must gain. Simulated: less means more switches and longer waits;
more makes small queues wait."""

PARK_PART = 0.2
"""`batch` parks running requests if a switch there and back takes at most this part of a request's
time. To wait for the last ones would leave the engine nearly empty for longer."""


def fifo(_settings: PolicySettings) -> Policy:
    """Make the policy that serves strictly in the order of arrival."""

    def decide(snapshot: Snapshot) -> Decision:
        next_one = min(snapshot.others, key=lambda queue: queue.first)
        if snapshot.own is not None and snapshot.own.first < next_one.first:
            return ServeOn(before=next_one.first)
        return SwitchTo(next_one.alias)

    return decide


def batch(settings: PolicySettings) -> Policy:
    """Make the policy that serves a queue, and switches when idle or when that gains enough.

    Running requests are waited for. They are parked if a switch takes next to nothing compared with
    them.
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
    """Return the queue of the highest priority that has waited most per second of its work.

    The wait is that of all its requests together, times its weight. The work is the switch and one
    request. Among several, the queue whose first request came first is returned.

    Requests served per second would keep the mean wait lowest if jobs were done one after the other
    (W. E. Smith, "Various optimizers for single-stage production", Naval Research Logistics
    Quarterly 3, 1956). To count them by how long they have waited does not raise the mean, and does
    not leave small queues behind.
    """
    best, best_priority, best_rate = None, 0, 0.0
    for queue in queues:  # a loop, because most of a decision's time is spent here
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
    """Return when waiting requests will have lost `GAIN` times what a switch costs those served.

    That is when to stop renting and buy, if it is unknown for how long one would rent (the ski
    rental problem). With a gain of 1 it costs at most twice as much as the best choice in
    hindsight, with 2 at most three times as much. On average it costs less.
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
    """Make the policy that gives each model a slice of time, and parks what is not finished."""

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
    """Make the policy of that name: one of `POLICIES`, or one that an entry point names.

    Raises:
        ConfigError: there is no such policy, or it cannot be made.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in POLICIES and name not in found:
        known = ", ".join([*POLICIES, *sorted(found)])
        raise ConfigError(
            f"switching.policy {name!r} is not known; known: {known}; packages add policies as "
            f"entry points of the group {GROUP}"
        )
    if name in POLICIES:
        return POLICIES[name](settings)
    try:
        policy: Policy = found[name].load()(settings)
    except Exception as error:
        raise ConfigError(
            f"switching.policy {name!r} cannot be created: {one_line(error)}"
        ) from error
    return policy
