"""Waits for an engine end when it dies, or its host does."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hotswap.engines.engine_waits import EngineWaits
from vllm_hotswap.errors import EngineUnavailable


def waits() -> tuple[EngineWaits, Any]:
    link: Any = SimpleNamespace(died=asyncio.get_running_loop().create_future())
    return EngineWaits("llama", link), link


async def forever() -> None:
    await asyncio.Event().wait()


async def test_an_answer_is_returned() -> None:
    """A wait returns what is answered."""
    engine, _ = waits()

    assert 7 == await engine.until_answered(asyncio.sleep(0, 7))


async def test_the_hosts_end_ends_a_wait() -> None:
    """The end of the host ends a wait, with its cause."""
    engine, link = waits()
    wait = asyncio.create_task(engine.until_answered(forever()))
    await asyncio.sleep(0)

    link.died.set_result("killed by signal 9")

    with pytest.raises(EngineUnavailable, match="killed by signal 9"):
        await wait


async def test_the_engines_end_ends_every_wait() -> None:
    """The end of an engine ends every wait for it, whichever began last, and ends no later one."""
    engine, _ = waits()
    first, last = (asyncio.create_task(engine.until_answered(forever())) for _ in range(2))
    await asyncio.sleep(0)

    engine.engine_died("RuntimeError: step failed")

    with pytest.raises(EngineUnavailable, match="the engine of 'llama' died: RuntimeError"):
        await first
    with pytest.raises(EngineUnavailable, match="the engine of 'llama' died: RuntimeError"):
        await last
    assert 7 == await engine.until_answered(asyncio.sleep(0, 7))
