"""The canary: what counts as the same, and what happens to a model that has changed."""

from __future__ import annotations

import math

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from vllm_hotswap.engines.canary import Canary
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
    """Rounding, as by another batch in half precision, makes no difference, even in a tie."""
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
    """A difference is reported with what it is."""
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
    """A flaw that no healthy model generates is found without a comparison, even the first time."""
    assert why in str(canary.flaw())


async def test_model_is_verified_once_per_load(server: Server) -> None:
    """A model is verified once per load, not at each activation: a parked engine lost nothing."""
    for alias in ("qwen", "llama", "qwen", "mistral", "qwen"):
        await server.coordinator.switch(alias)

    assert ["llama", "qwen", "mistral"] == server.host.verified


async def test_model_is_verified_again_after_a_wake(server: Server) -> None:
    """A model is verified again after a wake, because its memory was released."""
    await server.coordinator.switch("qwen")
    await server.operate("llama", "sleep", level=1)
    await server.operate("llama", "wake")

    await server.coordinator.switch("llama")

    assert ["llama", "qwen", "llama"] == server.host.verified


async def test_target_that_is_not_what_it_was_is_unloaded(server: Server) -> None:
    """A target that changed is unloaded: the source stays, waiting requests get the cause."""
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
    """If the default model cannot be verified, the start fails."""
    server = Server()
    await server.host.start()
    server.host.fail_next("verify", "llama", VerifyFailed("llama", "its numbers are not finite"))

    with pytest.raises(HotswapError, match="not finite"):
        await server.coordinator.start(("llama",), "llama")


async def test_verifying_can_be_left_out(make_server: MakeServer) -> None:
    """Verification can be turned off; then no canary is sent."""
    server = await make_server(verify=False)

    await server.coordinator.switch("qwen")

    assert [] == server.host.verified
