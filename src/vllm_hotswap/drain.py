"""Waiting for the requests of one model, ending them, and parking them.

Whoever decides is the coordinator; nothing here decides anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from vllm_hotswap.errors import ParkedEnded
from vllm_hotswap.registry import Cut, Lease, Model

CUT_GRACE_S = 5.0
"""Seconds that a request which was ended gets to notice, and then again to send its error."""


async def until_empty(model: Model, timeout_s: float | None) -> None:
    """Return when no request of the model runs any more, or after `timeout_s`, if there is one.

    Parked requests do not run. `look_again` ends the wait, too.
    """
    if not is_running(model) or (timeout_s is not None and timeout_s <= 0):
        return
    model.emptied = asyncio.get_running_loop().create_future()
    try:
        await asyncio.wait([model.emptied], timeout=timeout_s)
    finally:
        model.emptied = None


async def until_ended(model: Model) -> None:
    """Wait for requests that `end` has ended, whoever asks to look again meanwhile."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + 2 * CUT_GRACE_S
    while is_running(model) and (left_s := deadline_s - loop.time()) > 0:
        await until_empty(model, left_s)


def look_again(model: Model) -> None:
    """Have whoever waits in `until_empty` see whether it is to wait for longer."""
    if model.emptied is not None and not model.emptied.done():
        model.emptied.set_result(None)


def release(model: Model, lease: Lease) -> None:
    """The request is over."""
    lease.is_over = True
    lease.settle()
    model.leases.pop(lease, None)
    if not is_running(model):
        look_again(model)


def is_running(model: Model) -> bool:
    return not all(lease.is_parked for lease in model.leases)


def end(leases: Iterable[Lease], cause: Cut) -> int:
    """End requests; how many were not answered yet.

    Those that go on all the same are cancelled after a grace.
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
    """Freeze the model's requests with its engine, the oldest first; how many."""
    cause = ParkedEnded(
        model.alias, f"it was parked for more than {timeout_s:g} s (switching.parked_timeout)"
    )
    running = [lease for lease in model.leases if lease.is_open and not lease.is_parked]
    parked = running[: max(0, at_most - len(model.parked))]
    for lease in parked:
        lease.park(timeout_s, partial(end, [lease], cause))
    return len(parked)
