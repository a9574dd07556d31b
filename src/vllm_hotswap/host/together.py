"""Sleeping and waking of a model whose workers are several processes: all of them, or none.

What one worker raises reaches the engine as a text, and says nothing of the others. So nothing that
may fail for want of memory is done by the call that has the last word: all workers get ready first,
and say what is in the way. One that cannot has all others undo it.

`Rpc` is `collective_rpc` of vLLM's executors. The methods are those of `host.cuda_hosting`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.states import WakeProgress


class HalfAsleep(HotswapError):
    """Some workers of a model sleep, others do not: nothing can be done with it but to end it."""


class Rpc(Protocol):
    """Has every worker call a method; returns what each has answered, in the order of ranks."""

    def __call__(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]: ...


def get_ready_to_sleep(rpc: Rpc) -> None:
    """Have all workers copy what is kept. Raises `NoRoom` if one cannot; nothing has changed."""
    _all_or_none(rpc, "get_ready_to_sleep", "stay_awake")


def get_ready_to_wake(rpc: Rpc) -> None:
    """Have all workers take their memory. Raises `NoRoom` if one cannot; all are asleep then."""
    _all_or_none(rpc, "get_ready_to_wake", "give_up_wake")


def wake_some(rpc: Rpc, at_most: int) -> WakeProgress:
    """Have all workers take a part of their memory; the progress is that of all together.

    Raises `NoRoom` if one cannot, and all have given back what they had taken.
    """
    told = _all_or_none(rpc, "wake_some", "give_up_wake", (at_most,))
    return WakeProgress(sum(done for done, _ in told), sum(total for _, total in told))


def give_up_wake(rpc: Rpc, at_most: int) -> int:
    """Have all workers give back a part of what they have taken; the bytes that are left."""
    return sum(rpc("give_up_wake", args=(at_most,)))


def _all_or_none(rpc: Rpc, do: str, undo: str, args: tuple[Any, ...] = ()) -> list[Any]:
    """What the workers have answered. A text is why a worker has no room."""
    try:
        told = rpc(do, args=args)
    except BaseException:
        with suppress(Exception):  # the first cause counts
            rpc(undo)
        raise
    if refusals := [answer for answer in told if isinstance(answer, str)]:
        with suppress(Exception):
            rpc(undo)
        raise NoRoom(refusals[0])
    return told
