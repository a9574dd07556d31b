"""Models of a known size, and a budget for one and a half of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.helpers.support import Server, lease as lease_of
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import FakeSettings

MIB = 1 << 20
ALIASES = ("llama", "qwen", "mistral")
SIZE = FakeSettings(weights_bytes=2 * MIB, kv_bytes=2 * MIB)
ONE_AND_A_HALF = Usage(6 * MIB, 100 * MIB)
"""One loaded model, and the weights of another one."""


def sized(**others: Any) -> dict[str, FakeSettings]:
    """Every model holds 2 MiB of weights and 2 MiB of KV memory."""
    return {alias: others.get(alias, SIZE) for alias in ALIASES}


@contextmanager
def request_of(server: Server, alias: str) -> Iterator[None]:
    """Send a request that continues although its model is not active."""
    leases = server.coordinator.registry.resolve(alias).leases
    leases[lease_of(alias, 1)] = None
    yield
    leases.clear()


async def code(call: asyncio.Task[httpx.Response]) -> tuple[int, str]:
    response = await call
    return response.status_code, response.json()["error"]["code"]
