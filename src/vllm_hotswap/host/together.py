"""Sleeps and wakes a model whose workers are several processes: all of them, or none.

What one worker raises reaches the engine as a text, and says nothing of the others. So the final
call does nothing that may fail for lack of memory: all workers get ready first, and report what is
in the way. If one cannot, all undo their preparation.

`Rpc` is `collective_rpc` of vLLM's executors. The methods are those of `host.cuda_hosting`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.states import WakeProgress


class HalfAsleep(HotswapError):
    """Some workers of a model sleep, others do not: its engine can only be given up."""


class Rpc(Protocol):
    """Calls a method of every worker; returns their answers, in the order of ranks."""

    def __call__(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]: ...


def get_ready_to_sleep(rpc: Rpc) -> None:
    """Make all workers copy what is kept. Raises `NoRoom` if one cannot; nothing has changed."""
    _all_or_none(rpc, "get_ready_to_sleep", "stay_awake")


def get_ready_to_wake(rpc: Rpc) -> None:
    """Make all workers take their memory. Raises `NoRoom` if one cannot; all are asleep then."""
    _all_or_none(rpc, "get_ready_to_wake", "give_up_wake")


def wake_some(rpc: Rpc, at_most: int) -> WakeProgress:
    """Make all workers take a part of their memory; return the progress of all together.

    Raises `NoRoom` if one cannot, and all have given back what they had taken.
    """
    results = _all_or_none(rpc, "wake_some", "give_up_wake", (at_most,))
    return WakeProgress(sum(done for done, _ in results), sum(total for _, total in results))


def give_up_wake(rpc: Rpc, at_most: int) -> int:
    """Make all workers give back a part of what they have taken; return the bytes left."""
    return sum(rpc("give_up_wake", args=(at_most,)))


def _all_or_none(rpc: Rpc, do: str, undo: str, args: tuple[Any, ...] = ()) -> list[Any]:
    """Return the workers' answers. A text among them is why a worker has no room: all undo."""
    try:
        results = rpc(do, args=args)
    except BaseException:
        with suppress(Exception):  # the first cause counts
            rpc(undo)
        raise
    if refusals := [answer for answer in results if isinstance(answer, str)]:
        with suppress(Exception):
            rpc(undo)
        raise NoRoom(refusals[0])
    return results
