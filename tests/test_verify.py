"""The canary: what counts as the same, and what becomes of a model that is not what it was."""

from __future__ import annotations

import math

import pytest

from tests.conftest import MakeServer
from tests.support import Server
from vllm_hotswap.canary import Canary
from vllm_hotswap.errors import HotswapError, SwitchFailed, VerifyFailed

FIRST = Canary(7, {7: -0.10, 9: -2.5})
TIED = Canary(7, {7: -0.70, 9: -0.72})
POOLED = Canary(pooled=(0.6, -0.8))


@pytest.mark.parametrize(
    ("first", "now"),
    [
        (FIRST, FIRST),
        (FIRST, Canary(7, {7: -0.15, 9: -2.4})),
        (TIED, Canary(9, {9: -0.70, 7: -0.71})),
        (POOLED, Canary(pooled=(0.605, -0.805))),
        (Canary(7), Canary(7)),
    ],
)
def test_rounding_makes_no_difference(first: Canary, now: Canary) -> None:
    """Another batch in half precision gives slightly other numbers, and may turn a tie."""
    assert now.difference(first) is None
    assert now.flaw() is None


@pytest.mark.parametrize(
    ("first", "now", "why"),
    [
        (FIRST, Canary(9, {9: -0.1, 7: -2.5}), "generates token 9, not 7"),
        (FIRST, Canary(7, {7: -0.7, 9: -1.5}), "log-probability of its token is -0.700, not -0.1"),
        (TIED, Canary(8, {8: -0.70, 7: -0.71}), "generates token 8, not 7"),
        (POOLED, Canary(pooled=(0.8, -0.6)), "vector is off by 25%"),
        (POOLED, Canary(pooled=(0.6,)), "pools 1 values, not 2"),
    ],
)
def test_difference_is_told(first: Canary, now: Canary, why: str) -> None:
    """Which one it is."""
    assert why in str(now.difference(first))


@pytest.mark.parametrize(
    ("canary", "why"),
    [
        (Canary(0, {0: math.nan}), "not finite"),
        (Canary(pooled=(math.inf, 1.0)), "not finite"),
        (Canary(pooled=(0.0, 0.0)), "vector is zero"),
    ],
)
def test_flaw_needs_no_comparison(canary: Canary, why: str) -> None:
    """No healthy model generates it, not even the first time."""
    assert why in str(canary.flaw())


async def test_model_is_verified_once_per_load(server: Server) -> None:
    """Not each time it becomes active: a parked engine has lost nothing."""
    for alias in ("qwen", "llama", "qwen", "mistral", "qwen"):
        await server.coordinator.switch(alias)

    assert ["llama", "qwen", "mistral"] == server.host.verified


async def test_model_is_verified_again_after_a_wake(server: Server) -> None:
    """Its memory has been away."""
    await server.coordinator.switch("qwen")
    await server.operate("llama", "sleep", level=1)
    await server.operate("llama", "wake")

    await server.coordinator.switch("llama")

    assert ["llama", "qwen", "llama"] == server.host.verified


async def test_target_that_is_not_what_it_was_is_unloaded(server: Server) -> None:
    """The source stays active, held requests get the cause, and the next attempt loads it anew."""
    await server.coordinator.switch("qwen")
    await server.coordinator.switch("llama")
    await server.operate("qwen", "unload")
    server.host.corrupt("qwen")

    with pytest.raises(SwitchFailed, match="phase verify: verification of model 'qwen' failed"):
        await server.coordinator.switch("qwen")

    assert {"llama": "active", "qwen": "cold", "mistral": "cold"} == {
        alias: server.residency(alias) for alias in ("llama", "qwen", "mistral")
    }
    assert "llama" == (await server.ask("llama")).json()["model"]
    server.host.engines["qwen"].canary = "canary"
    assert (await server.coordinator.switch("qwen")).switched


async def test_default_that_is_not_verified_ends_the_start() -> None:
    """A server does not begin with it."""
    server = Server()
    await server.host.start()
    server.host.fail_next("verify", "llama", VerifyFailed("llama", "its numbers are not finite"))

    with pytest.raises(HotswapError, match="not finite"):
        await server.coordinator.start(("llama",), "llama")


async def test_verifying_can_be_left_out(make_server: MakeServer) -> None:
    """Nobody is asked for a canary."""
    server = await make_server(verify=False)

    await server.coordinator.switch("qwen")

    assert [] == server.host.verified
