"""Verification of vLLM's engine of one model: its canary, compared with that of its first load."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from vllm_hotswap.engines.canary import Canary
from vllm_hotswap.engines.engine_waits import EngineWaits
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.engines.vllm_canary import ask_for_canary, can_be_asked, is_overflow
from vllm_hotswap.errors import EngineUnavailable, VerifyFailed, one_line
from vllm_hotswap.host import Activate
from vllm_hotswap.launch import ModelLaunch
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")


class Verification:
    """Asks one model for its canary.

    The mutable state is `_first`, the canary of its first load, which `verify` remembers.
    """

    def __init__(self, launch: ModelLaunch, link: HostLink, waits: EngineWaits) -> None:
        self._alias = launch.alias
        self._config = launch.vllm_config
        self._link = link
        self._waits = waits
        self._first: Canary | None = None

    def __repr__(self) -> str:
        return f"<Verification {self._alias} has_first={self._first is not None}>"

    async def verify(self, client: Any, tasks: Collection[str], stamp: str) -> None:
        """Generate the canary with the engine, which is stepped with `stamp`.

        Raises:
            EngineUnavailable: the engine or its host died.
            VerifyFailed: the canary is not that of the first load, or not a number at all.
        """
        canary = await self._canary(client, tasks, stamp)
        if canary is None:
            return
        why = canary.flaw() or (self._first and canary.difference(self._first))
        if why:
            raise VerifyFailed(self._alias, why)
        self._first = self._first or canary

    async def _canary(self, client: Any, tasks: Collection[str], stamp: str) -> Canary | None:
        """The canary; None if it cannot be had, which says nothing of the model."""
        alias = value_text(self._alias)
        if not can_be_asked(tasks):
            log.info("event=not_verified model=%s reason='no canary for its tasks'", alias)
            return None
        try:
            return await self._waits.until_answered(ask_for_canary(client, self._config, tasks))
        except EngineUnavailable:
            raise
        except Exception as error:
            if not is_overflow(error):
                raise VerifyFailed(self._alias, one_line(error)) from error
            log.warning("event=not_verified model=%s reason=%r", alias, one_line(error))
        # Its parked requests are as many as may be, and are not to wait for it any longer.
        await self._link.call(lambda number: Activate(number, self._alias, stamp))
        return None
