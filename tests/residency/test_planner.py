"""Which models move down so that another can come up: examples, and rules for every plan."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
from hypothesis import assume, given, strategies as st

from vllm_hotswap.errors import NoRoom
from vllm_hotswap.models.footprint import Footprint, Usage, total
from vllm_hotswap.residency.planner import (
    EVICTIONS,
    MIB,
    MemorySnapshot,
    ModelView,
    Move,
    Plan,
    fits_together,
    make_plan,
    relief,
)
from vllm_hotswap.states import LADDER, Residency, is_below

ACTIVE, PARKED, ASLEEP = Residency.ACTIVE, Residency.PARKED, Residency.ASLEEP
DISCARDED, COLD = Residency.DISCARDED, Residency.COLD
RESTING = (COLD, ASLEEP, DISCARDED)
AMPLE = 10**6


def footprint(
    weights: int = 2,
    kv: int = 1,
    rest: int = 0,
    reading: int = 0,
    levels: tuple[int, ...] = (1, 2),
    offloads: bool = False,
) -> Footprint:
    """Return a footprint in MiB: `rest` stays until the unload, `reading` is for the load only."""
    parked = Usage(weights + kv + rest)
    asleep = Usage(rest, weights) if offloads else Usage(rest + weights)
    usage = {PARKED: parked, ASLEEP: asleep, DISCARDED: Usage(rest), COLD: Usage()}
    unknown = {where for level, where in ((1, ASLEEP), (2, DISCARDED)) if level not in levels}
    return Footprint(
        {where: times(size, MIB) for where, size in usage.items() if where not in unknown},
        times(parked + Usage(reading), MIB),
    )


def times(usage: Usage, unit: int) -> Usage:
    return Usage(usage.device * unit, usage.host * unit)


def model(alias: str, residency: Residency = PARKED, last: float = 0, **others: int) -> ModelView:
    flags = {name: others.pop(name) for name in ("pinned", "in_flight") if name in others}
    return ModelView(alias, residency, footprint(**others), last_used_s=last, **flags)  # type: ignore[arg-type]


def snapshot(budget: int, *models: ModelView, host: int = AMPLE) -> MemorySnapshot:
    return MemorySnapshot(models, times(Usage(budget, host), MIB))


def moves(plan: Plan) -> dict[str, str]:
    return {move.alias: move.after.value for move in plan.evictions}


# --- examples -------------------------------------------------------------------------------


def test_nobody_moves_where_there_is_room() -> None:
    """With enough room the target comes up beside the others, and none moves."""
    plan = make_plan(snapshot(6, model("a", ACTIVE), model("b", COLD)), "b")

    assert {} == moves(plan)
    assert Move("b", COLD, PARKED, times(Usage(-3), MIB), 0.0) == plan.bring_up
    assert [3, 6, 6] == [
        u.device // MIB for u in (plan.used_before, plan.used_peak, plan.used_after)
    ]


def test_weights_are_not_dropped_where_a_load_is_quicker() -> None:
    """Weights are dropped only where waking is faster than a load, as for compiled models."""
    a, b = model("a", PARKED, rest=1), model("b", COLD)
    slow = replace(a, up_s={DISCARDED: 2.0, COLD: 1.0})
    quick = replace(a, up_s={DISCARDED: 1.0, COLD: 2.0})

    assert {"a": "cold"} == moves(make_plan(snapshot(4, slow, b), "b"))
    assert {"a": "discarded"} == moves(make_plan(snapshot(4, quick, b), "b"))


@pytest.mark.parametrize(
    ("budget", "after"), [(6, None), (5, "asleep"), (4, "discarded"), (3, "cold")]
)
def test_source_goes_no_further_down_than_it_must(budget: int, after: str | None) -> None:
    """The source sleeps if that is enough, else drops its weights, and is unloaded last."""
    source = replace(model("a", ACTIVE), footprint=footprint(weights=1, kv=1, rest=1))

    plan = make_plan(snapshot(budget, source, model("b", COLD)), "b")

    assert after == moves(plan).get("a")


def test_what_a_sleeping_model_leaves_on_the_device_counts() -> None:
    """Sleepers' remaining device memory counts: two leave too little, so one goes further down."""
    models = [
        model("a", ASLEEP, last=1, rest=1, offloads=True, levels=(1,)),
        model("b", ASLEEP, last=2, rest=1, offloads=True, levels=(1,)),
        model("c", COLD, rest=1, offloads=True, levels=(1,)),
    ]

    assert {} == moves(make_plan(snapshot(6, *models), "c"))
    assert {"a": "cold"} == moves(make_plan(snapshot(5, *models), "c"))
    assert {"a": "cold", "b": "cold"} == moves(make_plan(snapshot(4, *models), "c"))
    with pytest.raises(NoRoom, match=r"'b' keeps 1.0 MiB of device and 2.0 MiB of host memory"):
        make_plan(snapshot(4, models[0], replace(models[1], pinned=True), models[2]), "c")


# --- a budget that has shrunk --------------------------------------------------------------------


def relieved(snapshot: MemorySnapshot, *keep: str) -> dict[str, str]:
    return {move.alias: move.after.value for move in relief(snapshot, keep)}


def test_nobody_moves_while_all_fit() -> None:
    """While all models fit, a smaller budget moves none."""
    assert {} == relieved(snapshot(6, model("a", ACTIVE), model("b")), "a")


def test_models_move_down_until_they_fit() -> None:
    """Models move down, the least recently used first, until they fit; the active one stays."""
    models = [
        model("a", ACTIVE, last=0, offloads=True),
        model("b", last=1, offloads=True),
        model("c", last=2, offloads=True),
        model("d", COLD),
    ]

    assert {"b": "asleep"} == relieved(snapshot(6, *models), "a")
    assert {"b": "asleep", "c": "asleep"} == relieved(snapshot(5, *models), "a")
    assert {"b": "asleep"} == relieved(snapshot(8, *models), "a")


def test_what_can_be_done_is_done_where_it_does_not_suffice() -> None:
    """Relief does what it can, even if the active model alone exceeds what is left."""
    models = [model("a", ACTIVE, weights=9), model("b", in_flight=1), model("c", pinned=True)]

    assert {"b": "asleep"} == relieved(snapshot(5, *models), "a")


@given(st.data())
def test_relief_never_makes_it_worse(data: st.DataObject) -> None:
    """Each move of a relief frees device memory, or host memory that others need."""
    count = data.draw(st.integers(1, 5))
    models = [
        model(
            str(number),
            data.draw(st.sampled_from([PARKED, ASLEEP, COLD])),
            last=data.draw(st.integers(0, 9)),
            weights=data.draw(st.integers(0, 4)),
            kv=data.draw(st.integers(0, 4)),
            rest=data.draw(st.integers(0, 2)),
            offloads=data.draw(st.booleans()),
        )
        for number in range(count)
    ]
    before = snapshot(data.draw(st.integers(0, 30)), *models, host=data.draw(st.integers(0, 30)))
    assume(before.used.host <= before.budget.host)

    found = relief(before)

    after = before.used - total(move.frees for move in found)
    assert after.device <= before.used.device
    assert after.host <= before.budget.host
    if before.used.fits(before.budget):
        assert () == found


def test_least_recently_used_goes_first() -> None:
    """The least recently used model goes down first; the most recently used one stays."""
    models = [model("new", last=9), model("old", last=1), model("b", COLD)]

    assert {"old": "asleep"} == moves(make_plan(snapshot(8, *models), "b"))


def test_sleeping_is_preferred_to_unloading() -> None:
    """All models sleep before one is unloaded, although fewer moves would suffice."""
    models = [model("new", last=9), model("old", last=1), model("b", COLD)]

    assert {"old": "asleep", "new": "asleep"} == moves(make_plan(snapshot(7, *models), "b"))


def test_moves_that_turn_out_to_be_unnecessary_are_not_made() -> None:
    """Once the oldest must drop its weights, others stay if that is enough."""
    big = replace(model("old", last=1), footprint=footprint(weights=6))
    models = [big, model("new", last=9), model("b", COLD, weights=5)]

    assert {"old": "discarded"} == moves(make_plan(snapshot(10, *models), "b"))


def test_waking_takes_no_more_than_what_is_held_then() -> None:
    """A wake takes no more than what is held then; only reading weights takes more."""
    asleep, cold = model("b", ASLEEP, reading=2), model("c", COLD, reading=2)

    assert 3 == make_plan(snapshot(3, asleep), "b").used_peak.device // MIB
    assert (5, 3) == tuple(
        usage.device // MIB
        for plan in [make_plan(snapshot(5, cold), "c")]
        for usage in (plan.used_peak, plan.used_after)
    )
    with pytest.raises(NoRoom):
        make_plan(snapshot(4, cold), "c")


def test_host_memory_limits_who_may_sleep() -> None:
    """A model drops its weights where host memory is too full to let it sleep with them."""
    models = [model("a", last=1, offloads=True), model("b", COLD, offloads=True)]

    assert {"a": "asleep"} == moves(make_plan(snapshot(3, *models, host=2), "b"))
    assert {"a": "discarded"} == moves(make_plan(snapshot(3, *models, host=1), "b"))


def test_target_that_sleeps_holds_host_memory_until_it_is_woken() -> None:
    """A sleeping target holds host memory until woken, so no other can sleep in its place."""
    models = [model("a", ACTIVE, offloads=True), model("b", ASLEEP, offloads=True)]

    assert {"a": "discarded"} == moves(make_plan(snapshot(3, *models, host=3), "b"))
    assert {"a": "asleep"} == moves(make_plan(snapshot(3, *models, host=4), "b"))


def test_one_is_unloaded_so_that_a_busy_one_can_sleep() -> None:
    """Host memory is taken from a sleeper without requests first, so that a busy one can sleep."""
    models = [
        model("busy", last=1, in_flight=1, offloads=True),
        model("free", ASLEEP, last=9, offloads=True, levels=(1,)),
        model("b", COLD),
    ]

    plan = make_plan(snapshot(3, *models, host=3), "b")

    assert [("free", "cold"), ("busy", "asleep")] == list(moves(plan).items())


def test_costs_are_of_coming_back() -> None:
    """A plan gives the cost to bring back each evicted model, and the target from where it is."""
    up_s = {ASLEEP: 0.5, COLD: 7.0}
    models = [replace(model("a"), up_s=up_s), replace(model("b", COLD), up_s=up_s)]

    plan = make_plan(snapshot(5, *models), "b")

    assert [0.5] == [move.cost_s for move in plan.evictions]
    assert 7.0 == plan.cost_s


def test_no_room_is_told_with_the_arithmetic() -> None:
    """A refusal lists the target's need, what each model keeps and why, and the budget."""
    models = [
        model("a", ACTIVE),
        model("b", pinned=True),
        model("c", in_flight=2),
        model("d", in_flight=1, offloads=True),
        model("e", Residency.LOADING),
        model("f", last=1),
        model("g", COLD),
        model("h", ASLEEP),
        model("target", COLD, weights=6, reading=1),
    ]

    with pytest.raises(NoRoom) as caught:
        make_plan(snapshot(20, *models, host=9), "target", keep=["a", "h"])

    assert (
        "no room: 'target' needs 8.0 MiB; 'a' keeps 3.0 MiB (active); 'b' keeps 3.0 MiB (pinned); "
        "'c' keeps 2.0 MiB (2 requests in flight); 'd' keeps 0.0 MiB of device and 2.0 MiB of host "
        "memory (1 requests in flight); 'e' keeps 3.0 MiB (loading); 'h' keeps 2.0 MiB (in use); "
        "the budget for models is 20.0 MiB of device and 9.0 MiB of host memory"
    ) == caught.value.message


def test_models_fit_together_if_the_last_of_them_can_be_loaded() -> None:
    """Models fit together if each can be loaded last: temporary memory counts once."""
    models = [model("a", COLD, reading=1), model("b", COLD, reading=2)]

    assert not fits_together(models, times(Usage(7), MIB))
    assert fits_together(models, times(Usage(8), MIB))
    assert fits_together([], Usage())


# --- every plan -----------------------------------------------------------------------------

MiB = st.integers(0, 8)
footprints = st.sampled_from(
    [
        footprint(weights, kv, rest, reading, levels, offloads)
        for weights in (0, 1, 3, 7)
        for kv in (0, 2, 5)
        for rest in (0, 1)
        for reading in (0, 2)
        for levels in [(1, 2), (1,), (2,), ()]
        for offloads in (False, True)
    ]
)
flags = st.sampled_from(
    [
        (pinned, in_flight, last_used_s)
        for pinned in (False, False, False, True)
        for in_flight in (0, 0, 0, 2)
        for last_used_s in range(4)
    ]
)


@st.composite
def views(draw: st.DrawFn, alias: str) -> ModelView:
    held = draw(footprints)
    places = [*held.usage, PARKED, PARKED, Residency.LOADING, Residency.FAILED]
    return ModelView(alias, draw(st.sampled_from(places)), held, *draw(flags))


@dataclass(frozen=True)
class Case:
    """A model to bring up, and the models beside it."""

    snapshot: MemorySnapshot
    target: str
    keep: tuple[str, ...]

    def plan(self) -> Plan:
        return make_plan(self.snapshot, self.target, self.keep)

    def find_plan(self) -> Plan:
        """Return the plan, where there is one."""
        plan = self.try_plan()
        assume(plan is not None)
        assert plan is not None
        return plan

    def try_plan(self) -> Plan | None:
        try:
            return self.plan()
        except NoRoom:
            return None

    @property
    def movable(self) -> list[ModelView]:
        kept = {self.target, *self.keep}
        return [view for view in self.snapshot.models if view.alias not in kept]

    def allowed(self, view: ModelView) -> list[Residency]:
        """Return where a model may go, or stay; written from the rules, not from the planner."""
        if view.pinned or view.residency in (Residency.LOADING, Residency.FAILED):
            return [view.residency]
        known = [where for where in EVICTIONS if where in view.footprint.usage]
        below = [where for where in known if is_below(where, view.residency)]
        return [view.residency, *(w for w in below if w is ASLEEP or not view.in_flight)]

    def after(self, residencies: Mapping[str, Residency]) -> Usage:
        """Return what all but the target hold."""
        return total(
            view.footprint.at(residencies.get(view.alias, view.residency))
            for view in self.snapshot.models
            if view.alias != self.target
        )

    def makes_room(self, residencies: Mapping[str, Residency]) -> bool:
        """Return whether the target can come up, without more than the budget on the way."""
        target, after = self.snapshot.find(self.target), self.after(residencies)
        before = after + Usage(0, target.footprint.at(target.residency).host)
        return (after + target.needs()).fits(self.snapshot.budget) and (
            before.host <= self.snapshot.budget.host
        )


@st.composite
def cases(draw: st.DrawFn, host: st.SearchStrategy[int] = MiB) -> Case:
    """Draw some models, one of which is to be brought up; what they hold is within the budget."""
    count = draw(st.integers(0, 4))
    others = [draw(views(f"m{number}")) for number in range(count)]
    if others and draw(st.booleans()):
        others[0] = replace(others[0], residency=ACTIVE, pinned=False)
    target = draw(views("target"))
    if target.residency not in RESTING:
        target = replace(target, residency=COLD)
    models = draw(st.permutations([*others, target]))
    used = MemorySnapshot(tuple(models), Usage()).used
    spare = times(Usage(draw(MiB), draw(host)), MIB)
    keep = tuple(v.alias for v in others[:1] if v.residency is ACTIVE and draw(st.booleans()))
    return Case(MemorySnapshot(tuple(models), used + spare), "target", keep)


@given(cases())
def test_only_those_are_moved_that_may_be_and_only_as_far(case: Case) -> None:
    """Only movable models move: down, once, and never the target; busy ones go down to asleep."""
    plan = case.find_plan()

    movable = {view.alias: case.allowed(view)[1:] for view in case.movable}
    assert all(move.after in movable.get(move.alias, []) for move in plan.evictions)
    assert len(moves(plan)) == len(plan.evictions)


@given(cases())
def test_no_moment_of_a_plan_exceeds_the_budget(case: Case) -> None:
    """No moment of a plan exceeds the budget: after a move, during the load or wake, at the end."""
    plan = case.find_plan()

    steps = [plan.used_before, *(times(move.frees, -1) for move in plan.evictions)]
    moments = [*accumulate(steps, Usage.__add__), plan.used_peak, plan.used_after]
    assert all(moment.fits(case.snapshot.budget) for moment in moments)


@given(cases())
def test_plan_says_what_it_does(case: Case) -> None:
    """A plan states where each model was and will be, what moves free, and memory at each end."""
    plan = case.find_plan()
    find = case.snapshot.find

    assert plan.bring_up is not None
    assert all(
        (find(move.alias).residency, find(move.alias).footprint.at(move.after) + move.frees)
        == (move.before, find(move.alias).footprint.at(move.before))
        for move in (*plan.evictions, plan.bring_up)
    )
    rest = case.after({move.alias: move.after for move in plan.evictions})
    target = find("target")
    assert case.snapshot.used == plan.used_before
    assert rest + target.needs() == plan.used_peak
    assert rest + target.footprint.at(PARKED) == plan.used_after


@given(cases())
def test_every_eviction_is_necessary(case: Case) -> None:
    """Every eviction is necessary: none can be dropped or reduced while all others are made."""
    after = {move.alias: move.after for move in case.find_plan().evictions}

    allowed = {alias: case.allowed(case.snapshot.find(alias)) for alias in after}
    milder = [
        {**after, alias: other}
        for alias, residency in after.items()
        for other in allowed[alias]
        if is_below(residency, other)
    ]
    assert not any(case.makes_room(residencies) for residencies in milder)


@given(cases())
def test_nobody_goes_lower_than_is_necessary_for_all(case: Case) -> None:
    """No model goes lower than all must: if sleep is enough for all, none drops its weights."""
    plan = case.find_plan()

    lowest = {limit: lowest_allowed(case, limit) for limit in EVICTIONS}
    enough = next((limit for limit in EVICTIONS if case.makes_room(lowest[limit])), COLD)
    assert not any(is_below(move.after, enough) for move in plan.evictions)


@given(cases(host=st.just(AMPLE)))
def test_there_is_no_room_only_if_everyone_at_its_lowest_makes_none(case: Case) -> None:
    """A plan is refused only if even all models at their lowest make no room."""
    assert case.makes_room(lowest_allowed(case, COLD)) == (case.try_plan() is not None)


@given(cases())
def test_scarce_host_memory_costs_no_plan_that_needs_none_of_it(case: Case) -> None:
    """If all models at their lowest make room, there is a plan, however scarce host memory is."""
    assume(case.makes_room(lowest_allowed(case, COLD)))

    assert case.try_plan() is not None


@given(cases(host=st.just(AMPLE)))
def test_no_room_names_every_number(case: Case) -> None:
    """A refusal's numbers add up to more than the budget, in the units that are printed."""
    assume(case.try_plan() is None)
    with pytest.raises(NoRoom) as caught:
        case.plan()

    needs, *kept, budget = caught.value.message.split("; ")
    sizes = [float(re.findall(r" (\d+\.\d) MiB", part)[0]) for part in (needs, *kept, budget)]
    assert "'target' needs" in needs
    assert sum(sizes[:-1]) > sizes[-1]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True), footprints, MiB, MiB)
def test_least_recently_used_goes_first_among_equals(
    last_used: list[int], size: Footprint, spare: int, host: int
) -> None:
    """Of models that are alike, the older one never ends above the newer one."""
    models = [
        ModelView(f"m{n}", PARKED, size, last_used_s=time) for n, time in enumerate(last_used)
    ]
    target = model("target", COLD, weights=7)
    used = MemorySnapshot(tuple(models), Usage()).used
    case = Case(
        MemorySnapshot((*models, target), used + times(Usage(spare, host), MIB)), "target", ()
    )

    plan = case.find_plan()

    oldest_first = sorted(models, key=lambda view: view.last_used_s)
    after = moves(plan)
    depths = [LADDER.index(Residency(after.get(view.alias, "parked"))) for view in oldest_first]
    assert sorted(depths, reverse=True) == depths


@given(cases(), st.sampled_from([PARKED, ACTIVE]))
def test_target_that_is_up_needs_nothing(case: Case, residency: Residency) -> None:
    """A target that is up needs neither memory nor evictions, however full it is."""
    models = tuple(
        replace(view, residency=residency) if view.alias == "target" else view
        for view in case.snapshot.models
    )

    plan = make_plan(replace(case.snapshot, models=models), "target")

    assert ((), None, 0.0) == (plan.evictions, plan.bring_up, plan.cost_s)
    assert plan.used_before == plan.used_peak == plan.used_after


@given(cases(), st.randoms())
def test_plan_depends_on_nothing_but_the_models(case: Case, chance: random.Random) -> None:
    """A plan is the same when repeated, and in whatever order the models come."""
    models = case.snapshot.models
    shuffled = replace(case.snapshot, models=tuple(chance.sample(models, len(models))))

    assert case.try_plan() == case.try_plan()
    assert case.try_plan() == replace(case, snapshot=shuffled).try_plan()


def lowest_allowed(case: Case, limit: Residency) -> dict[str, Residency]:
    """Return where all models are that go as low as they may, but not below `limit`."""
    return {
        view.alias: [
            where
            for where in case.allowed(view)
            if where is view.residency or not is_below(where, limit)
        ][-1]
        for view in case.movable
    }
