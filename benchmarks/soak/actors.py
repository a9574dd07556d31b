"""The actors of a soak: clients, a switcher, a killer and a sampler."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Sequence

import psutil

from benchmarks.soak.cases import ALIASES, Case
from benchmarks.soak.growth import sample
from benchmarks.soak.ledger import Outcome
from benchmarks.soak.run import RECOVERY_S, Kill, Run, Switched
from benchmarks.wire import PATIENT, Manner

REQUEST_DEADLINE_S = 240.0
"""Longer than all waits of a request: held, parked several times, a recovery in between."""
ACTIVE_SHARE = 0.8
"""The share of requests that go to the model that was last known to be active."""
THINK_S = 0.15
BACK_OFF_S = 0.05

DRAIN_TIMEOUTS_S = (0.0, 0.05, 0.3, 2.0, 10.0)
DRAIN_WEIGHTS = (30, 25, 30, 10, 5)
DWELL_S = (0.02, 0.5)
"""How long a model stays active."""
RIVAL_SHARE = 0.15
"""The share of switches with other calls beside them, which join them or compete with them."""
OPERATION_SHARE = 0.05
"""The share of switches before which an inactive model is put to sleep or unloaded."""
OPERATIONS: Sequence[tuple[str, dict[str, int]]] = (
    ("sleep", {"level": 1}),
    ("sleep", {"level": 2}),
    ("unload", {}),
)

SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV)
TROUBLED = frozenset({"recovering", "degraded", "failed"})
"""States of a server that has noticed the loss of its host, or of the active model's engine."""
POLL_S = 0.05
SAMPLE_S = 3.0


# --- clients ----------------------------------------------------------------------------


async def client(run: Run, numbers: random.Random) -> None:
    """Send requests, one after the other, each with its own manner."""
    by_alias = {alias: [c for c in run.references if c.alias == alias] for alias in ALIASES}
    try:
        while not run.is_over:
            case = choose_case(numbers, by_alias, run.active)
            stream = case.can_stream and numbers.random() < 0.65
            outcome = await run.request(
                case, stream=stream, manner=choose_manner(numbers, stream=stream)
            )
            await asyncio.sleep(numbers.expovariate(1 / THINK_S))
            if outcome is not Outcome.ANSWERED:
                await asyncio.sleep(BACK_OFF_S)
    finally:
        run.clients_left -= 1


def choose_case(numbers: random.Random, by_alias: dict[str, list[Case]], active: str) -> Case:
    alias = active if numbers.random() < ACTIVE_SHARE and active else numbers.choice(ALIASES)
    return numbers.choice(by_alias[alias])


def choose_manner(numbers: random.Random, *, stream: bool) -> Manner:
    """Choose a manner: most are patient; some leave early or midway; some read slowly."""
    chance = numbers.random()
    if chance < 0.10:
        return Manner(REQUEST_DEADLINE_S, leave_after_s=numbers.uniform(0.0, 0.8))
    if stream and chance < 0.20:
        return Manner(REQUEST_DEADLINE_S, leave_after_events=numbers.randint(1, 100))
    if stream and chance < 0.30:
        return Manner(REQUEST_DEADLINE_S, pause_s=numbers.choice((0.005, 0.02, 0.1)))
    return Manner(REQUEST_DEADLINE_S)


# --- the switcher -----------------------------------------------------------------------


async def switcher(run: Run, numbers: random.Random) -> None:
    """Switch continually, also while the last clients wait for their parked requests."""
    while run.clients_left and run.server.exit_status is None:
        if numbers.random() < OPERATION_SHARE:
            await _operate(run, numbers)
        target = numbers.choice([alias for alias in ALIASES if alias != run.active])
        calls = [_switch(run, numbers, target, PATIENT)]
        if numbers.random() < RIVAL_SHARE:
            calls += [_rival(run, numbers, target) for _ in range(numbers.randint(1, 3))]
        await asyncio.gather(*calls)
        await asyncio.sleep(numbers.uniform(*DWELL_S))


async def _operate(run: Run, numbers: random.Random) -> None:
    alias = numbers.choice([alias for alias in ALIASES if alias != run.active])
    operation, body = numbers.choice(OPERATIONS)
    await run.call("operation on a model", f"/admin/models/{alias}/{operation}", body)


async def _rival(run: Run, numbers: random.Random, target: str) -> None:
    """Make another call, which joins the switch or competes with it; its caller may leave."""
    await asyncio.sleep(numbers.uniform(0.0, 0.05))
    leaves = numbers.random() < 0.3
    manner = Manner(leave_after_s=numbers.uniform(0.0, 0.1)) if leaves else PATIENT
    await _switch(run, numbers, numbers.choice((target, *ALIASES)), manner)


async def _switch(run: Run, numbers: random.Random, target: str, manner: Manner) -> None:
    policy = numbers.choice(run.plan.policies)
    (drain_timeout_s,) = numbers.choices(DRAIN_TIMEOUTS_S, DRAIN_WEIGHTS)
    body = {"model": target, "drain_timeout": drain_timeout_s}
    if policy != "abort":
        body["on_drain_timeout"] = policy
    told = await run.call("switch call", "/v1/models/switch", body, manner)
    if told is None:
        await asyncio.sleep(BACK_OFF_S)
        return
    if told["current_model"] != target:
        run.problem(f"a switch to {target!r} was answered with {told}")
    run.active = target
    if told["switched"] and told["operation_id"] not in run.switched:
        if any(one.epoch == told["epoch"] for one in run.switched.values()):
            run.problem(f"two switches have the same epoch: {told}")
        run.switched[told["operation_id"]] = Switched(
            at_s=run.elapsed_s,
            target=target,
            policy=policy,
            drain_timeout_s=drain_timeout_s,
            epoch=told["epoch"],
            duration_ms=told["duration_ms"],
            phases_ms=told["phases"],
            requests_cut=told["requests_cut"],
            requests_parked=told.get("requests_parked", 0),
        )


# --- the killer -------------------------------------------------------------------------


async def killer(run: Run, numbers: random.Random) -> None:
    """Kill the engine host at intervals, and watch it come back."""
    every_s = run.plan.kill_every_s
    for number in itertools.cycle(SIGNALS):
        await asyncio.sleep(every_s * numbers.uniform(0.8, 1.2))
        if run.is_over:
            return
        await _kill(run, number)


async def _kill(run: Run, number: signal.Signals) -> None:
    _, status = await run.get("/admin/status")
    if status is None:
        return
    pid = status["host"]["pid"]
    if pid not in [process.pid for process in run.server.family()[1:]]:
        run.problem(f"the engine host's pid, {pid}, is not a process below the server")
        return
    kill = Kill(number.name, status["phase"], time.perf_counter())
    os.kill(pid, number)
    run.kills.append(kill)
    while not await _is_back(run, kill, pid):
        if run.server.exit_status is not None:
            return
        if time.perf_counter() - kill.at_s > RECOVERY_S:
            run.problem(f"not ready {RECOVERY_S:g} s after {kill.signal}")
            return
        await asyncio.sleep(POLL_S)
    if _runs(pid):
        run.problem(
            f"the host that got {kill.signal} is still running although its successor is ready"
        )


async def _is_back(run: Run, kill: Kill, pid: int) -> bool:
    """Whether the server is ready with another host; records what is seen before that."""
    ready, _ = await run.get("/ready")
    _, status = await run.get("/admin/status")
    since_s = time.perf_counter() - kill.at_s
    has_new_host = status is not None and status["host"]["pid"] not in {pid, None}
    if kill.noticed_s is None and status is not None and status["state"] in TROUBLED:
        kill.noticed_s = since_s
    if has_new_host and ready == 200:
        kill.ready_s = since_s
    return kill.ready_s is not None


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


# --- the sampler ------------------------------------------------------------------------


async def sampler(run: Run) -> None:
    """Record what the processes hold, and which model is active."""
    while True:
        await asyncio.sleep(SAMPLE_S)
        _, status = await run.get("/admin/status")
        if status is None or not status["host"]["pid"]:
            continue
        run.active = status["active"] or run.active
        loaded = [m["residency"] in {"active", "parked"} for m in status["models"].values()]
        taken = await asyncio.to_thread(
            sample,
            run.elapsed_s,
            len(run.switched),
            (run.server.pid, status["host"]["pid"]),
            run.temp,
            all_loaded=all(loaded),
        )
        if taken is not None:
            run.samples.append(taken)


def seeded(seed: int, names: Sequence[str]) -> dict[str, random.Random]:
    """Return random numbers for each actor, the same for the same seed."""
    return {name: random.Random(f"{seed} {name}") for name in names}  # noqa: S311
