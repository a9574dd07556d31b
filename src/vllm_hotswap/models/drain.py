"""Waiting for the requests of one model, aborting them, and parking them.

Nothing here decides anything: `switching` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from vllm_hotswap.errors import ParkedEnded
from vllm_hotswap.models.registry import Cut, Lease, Model
from vllm_hotswap.states import RequestStep

CUT_GRACE_S = 5.0
"""Seconds that an aborted request gets to notice, and then again to send its error."""


async def until_empty(model: Model, timeout_s: float | None) -> None:
    """Wait until no request of the model runs, or for `timeout_s` at most, if there is one.

    Parked requests do not count as running. `recheck` ends the wait, too.
    """
    if not is_running(model) or (timeout_s is not None and timeout_s <= 0):
        return
    model.drained = asyncio.get_running_loop().create_future()
    try:
        await asyncio.wait([model.drained], timeout=timeout_s)
    finally:
        model.drained = None


async def until_ended(model: Model) -> None:
    """Wait for requests that `end` has aborted, for twice `CUT_GRACE_S` at most."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + 2 * CUT_GRACE_S
    # A loop: `recheck` may end `until_empty` early, and says nothing about these requests.
    while is_running(model) and (left_s := deadline_s - loop.time()) > 0:
        await until_empty(model, left_s)


def recheck(model: Model) -> None:
    """Wake the caller that waits in `until_empty`, so that it checks its deadline again."""
    if model.drained is not None and not model.drained.done():
        model.drained.set_result(None)


def release(model: Model, lease: Lease) -> None:
    """Give a lease back: its request is over."""
    lease.step(RequestStep.END)
    lease.settle()
    model.leases.pop(lease, None)
    if not is_running(model):
        recheck(model)


def is_running(model: Model) -> bool:
    return not all(lease.is_parked for lease in model.leases)


def end(leases: Iterable[Lease], cause: Cut) -> int:
    """Abort requests. Return how many were not completely answered yet.

    The tasks of requests that still run after `CUT_GRACE_S` are cancelled.
    """
    ended = [lease for lease in leases if lease.cut is None]
    for lease in ended:
        lease.end(cause)
    if ended:
        asyncio.get_running_loop().call_later(CUT_GRACE_S, _kill, ended)
    return sum(lease.was_cut for lease in ended)


def _kill(ended: Iterable[Lease]) -> None:
    for lease in ended:
        if not lease.is_over:
            lease.kill()


def park(model: Model, timeout_s: float, at_most: int) -> int:
    """Freeze the model's requests with its engine, the oldest first. Return how many."""
    cause = ParkedEnded(
        model.alias, f"it was parked for more than {timeout_s:g} s (switching.parked_timeout)"
    )
    running = [lease for lease in model.leases if lease.is_open and not lease.is_parked]
    parked = running[: max(0, at_most - len(model.parked))]
    for lease in parked:
        lease.park(timeout_s, partial(end, [lease], cause))
    return len(parked)
