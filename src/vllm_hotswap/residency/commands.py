"""Work of an engine, with a deadline: a host that hangs is killed, and recovery starts another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from vllm_hotswap.config import RecoveryConfig
from vllm_hotswap.errors import EngineUnavailable, HotswapError
from vllm_hotswap.models import EngineHost, Model
from vllm_hotswap.states import Residency

T = TypeVar("T")


class Commands:
    """Awaits the work of engines. It has no state of its own."""

    def __init__(self, host: EngineHost, deadlines: RecoveryConfig) -> None:
        self._host = host
        self.deadlines = deadlines

    def __repr__(self) -> str:
        return f"<Commands timeout_s={self.deadlines.command_timeout:g}>"

    async def run_with_deadline(self, work: Awaitable[T], timeout_s: float, what: str) -> T:
        """Await the work of an engine, with a deadline.

        The engine host's one compute thread cannot be stopped. If the work is not done by its
        deadline, the host is killed, and recovery starts another one.

        Raises:
            EngineUnavailable: the work was not done in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            why = f"{what} did not finish within {timeout_s:g} s"
            self._host.kill(f"the engine host was stopped: {why}")
            raise EngineUnavailable(why) from None

    async def run(self, work: Awaitable[T], what: str) -> T:
        """Await work, with the deadline of all commands except loads.

        Raises:
            EngineUnavailable: the work was not done in time.
        """
        return await self.run_with_deadline(work, self.deadlines.command_timeout, what)

    async def run_for(self, model: Model, work: Awaitable[T], what: str) -> T:
        """Await a command to the engine of a model.

        Raises:
            EngineUnavailable: the work was not done in time, or the engine has died.
        """
        try:
            return await self.run(work, f"{what} of model {model.alias!r}")
        except HotswapError:
            refuse_failed(model)  # if its engine has died, that is the reason
            raise


def refuse_failed(model: Model) -> None:
    """Raise `EngineUnavailable` if the model's engine has died."""
    if model.residency is Residency.FAILED:
        raise EngineUnavailable(f"the engine of {model.alias!r} died: {model.failure}")
