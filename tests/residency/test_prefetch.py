"""Files that are read ahead, for a call or while a switch drains."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from tests.residency.models import MIB
from vllm_hotswap.errors import HotswapError
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import UNLIMITED, FakeSettings

# --- calls ----------------------------------------------------------------------------------


async def test_prefetch_says_how_much_it_read(server: Server) -> None:
    """A prefetch reports how much it read; a model that has its weights needs none."""
    cold = (await server.operate("mistral", "prefetch")).json()
    parked = (await server.operate("qwen", "prefetch")).json()

    assert (MIB, 0) == (cold["prefetched_bytes"], parked["prefetched_bytes"])
    assert ["cold", False] == [cold["residency"], cold["changed"]]


async def test_calls_for_a_prefetch_under_way_join_it(server: Server) -> None:
    """Calls for a prefetch under way join it, and the files are read once."""
    server.host.hold("prefetch", "mistral")
    calls = [server.operate("mistral", "prefetch") for _ in range(2)]
    await server.settled()

    server.host.release("prefetch", "mistral")

    assert [MIB, MIB] == [(await call).json()["prefetched_bytes"] for call in calls]
    assert [("prefetch", "mistral")] == server.host.operations


async def test_prefetch_waits_for_nobody(server: Server) -> None:
    """A prefetch waits for no other operation: reading files moves no model."""
    server.host.hold("sleep", "qwen")
    sleeping = server.operate("qwen", "sleep")
    await server.settled()

    assert 200 == (await server.operate("mistral", "prefetch")).status_code

    server.host.release("sleep", "qwen")
    await sleeping


async def test_prefetch_is_cancelled_on_request(server: Server) -> None:
    """A cancelled prefetch answers its waiting callers; a later call starts a new one."""
    server.host.hold("prefetch", "mistral")
    call = server.operate("mistral", "prefetch")
    await server.settled()

    cancelled = await server.operate("mistral", "prefetch", cancel=True)

    assert (200, True) == (cancelled.status_code, cancelled.json()["cancelled"])
    assert (200, 0) == ((await call).status_code, (await call).json()["prefetched_bytes"])
    server.host.release("prefetch", "mistral")
    assert MIB == (await server.operate("mistral", "prefetch")).json()["prefetched_bytes"]


async def test_cancelling_no_prefetch_is_no_mistake(server: Server) -> None:
    """Cancelling where no prefetch runs is not an error."""
    assert 200 == (await server.operate("mistral", "prefetch", cancel=True)).status_code


async def test_client_that_leaves_does_not_stop_a_prefetch(server: Server) -> None:
    """A client that leaves does not stop a prefetch: other callers and the load may need it."""
    server.host.hold("prefetch", "mistral")
    leaving = asyncio.create_task(server.coordinator.operations.prefetch("mistral"))
    await server.settled()
    leaving.cancel()
    await server.settled()

    joining = server.operate("mistral", "prefetch")
    await server.settled()
    server.host.release("prefetch", "mistral")

    assert MIB == (await joining).json()["prefetched_bytes"]
    assert [("prefetch", "mistral")] == server.host.operations


@pytest.mark.parametrize(("host_bytes", "read"), [(MIB // 2, MIB // 2), (0, 0), (9 * MIB, MIB)])
async def test_prefetch_is_bounded_by_the_host_budget(
    make_server: MakeServer, host_bytes: int, read: int
) -> None:
    """A prefetch reads no more than the host memory budget allows."""
    server = await make_server(budget=Usage(UNLIMITED.device, host_bytes))

    assert read == (await server.operate("mistral", "prefetch")).json()["prefetched_bytes"]


async def test_weights_asleep_leave_less_to_prefetch(make_server: MakeServer) -> None:
    """Weights asleep in host memory share its budget with a prefetch."""
    asleep = FakeSettings(offloads=True, weights_bytes=MIB)
    server = await make_server(
        settings={"qwen": asleep}, budget=Usage(UNLIMITED.device, MIB + MIB // 4)
    )
    await server.operate("qwen", "sleep")

    body = (await server.operate("mistral", "prefetch")).json()

    assert MIB // 4 == body["prefetched_bytes"]


async def test_prefetch_that_fails_is_told(server: Server) -> None:
    """A failed prefetch reports its cause."""
    server.host.fail_next("prefetch", "mistral", HotswapError("disk is gone"))

    response = await server.operate("mistral", "prefetch")

    assert (500, "disk is gone") == (response.status_code, response.json()["error"]["message"])


# --- switches -------------------------------------------------------------------------------


async def test_switch_to_a_cold_model_reads_ahead_while_it_drains(tight: Server) -> None:
    """While the source drains, a cold target's files are read ahead; a sleeping one needs none."""
    stream = await tight.start_stream("llama")
    switch = tight.switch("qwen")
    await tight.settled()
    assert [("prefetch", "qwen")] == tight.host.operations

    await stream.finish()
    await switch
    tight.host.operations.clear()
    await tight.switch("llama")

    assert ("prefetch", "llama") not in tight.host.operations


async def test_load_of_a_switch_reads_on_where_the_prefetch_was(tight: Server) -> None:
    """The load continues the prefetch and reads no file twice; its callers are answered."""
    tight.host.hold("prefetch", "qwen")
    stream = await tight.start_stream("llama")
    switch = tight.switch("qwen")
    await tight.settled()
    joined = tight.operate("qwen", "prefetch")
    await tight.settled()

    await stream.finish()

    assert 200 == (await switch).status_code
    assert (200, 0) == ((await joined).status_code, (await joined).json()["prefetched_bytes"])


async def test_switch_survives_files_that_cannot_be_read_ahead(tight: Server) -> None:
    """A switch survives files that cannot be read ahead; the load reports them."""
    tight.host.fail_next("prefetch", "qwen")

    assert 200 == (await tight.switch("qwen")).status_code
