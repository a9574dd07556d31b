"""A frontend whose client met an error in an output is rebuilt by the next load."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.contract.test_engines import answer_to, complete
from tests.helpers.faults import wait_until
from vllm_hotswap.engines.vllm_metrics import VLLM_REGISTRIES
from vllm_hotswap.models.engine import EngineHost
from vllm_hotswap.telemetry.metrics import exposition

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=pytest.mark.vllm)])
def backend(request: pytest.FixtureRequest) -> str:
    """A fake engine has no detokenizer."""
    return str(request.param)


async def test_an_error_in_an_output_costs_one_load(host: EngineHost) -> None:
    """An error in an output stops vLLM's client: the model fails, and one load heals it."""
    failed: list[tuple[str, str, int]] = []
    host.on_engine_failed(lambda *what: failed.append(what))
    llama: Any = host.engines["llama"]
    await llama.load(lambda _: None)
    await llama.activate(1)
    expected = await complete(llama, 3)
    before = llama.app
    client = llama._frontend.client

    def broken(*_: Any, **__: Any) -> None:
        raise OverflowError("out of range integral type conversion attempted")

    client.output_processor.process_outputs = broken
    assert 500 <= (await answer_to(llama, 3)).status_code
    await asyncio.to_thread(wait_until, lambda: bool(failed), 30)
    assert [("llama", 1)] == [(alias, load) for alias, _, load in failed]
    assert client.errored
    held = host.stats().used_bytes
    await llama.clean_up()
    await llama.clean_up()
    assert host.stats().used_bytes < held

    await llama.load(lambda _: None)
    await llama.activate(2)

    assert expected["choices"] == (await complete(llama, 3))["choices"]
    assert before is not llama.app
    assert 1 == exposition(VLLM_REGISTRIES).decode().count("# TYPE http_requests_total")
