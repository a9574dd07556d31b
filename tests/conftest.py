"""Fixtures of the fast tests: a server on fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers.depth import examples
from tests.helpers.support import Server
from tests.helpers.virtual import VirtualLoop
from vllm_hotswap.system import forgotten

settings.register_profile("fast", deadline=None, max_examples=examples(25))
settings.load_profile("fast")

MakeServer = Callable[..., Awaitable[Server]]
Story = Callable[[Server], Awaitable[None]]
Play = Callable[..., None]


ON_VLLM = Path(__file__).parent / "integration"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files of tests on the real vLLM where none is wanted: reading them takes seconds."""
    is_unwanted = "not vllm" in config.option.markexpr and collection_path == ON_VLLM
    return True if is_unwanted else None


@pytest.fixture(autouse=True)
def nothing_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset what servers in this process have set aside."""
    monkeypatch.setattr(forgotten, "_aside", {})


@pytest.fixture
async def make_server() -> AsyncIterator[MakeServer]:
    """Starts servers with other than the usual settings."""
    servers: list[Server] = []

    async def make(**kwargs: object) -> Server:
        servers.append(await Server(**kwargs).start())  # type: ignore[arg-type]
        return servers[-1]

    yield make
    for server in servers:
        await server.stop()
        assert 0 == server.host.stepped_while_parked
        assert 0 == server.host.operated_for_a_request


@pytest.fixture
async def server(make_server: MakeServer) -> Server:
    """A server on which llama is active, qwen is parked, mistral is cold."""
    return await make_server()


@pytest.fixture
def play() -> Iterator[Play]:
    """Runs a story on a separate server, under virtual time."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)

    async def whole(story: Story, **kwargs: object) -> None:
        server = await Server(clock=loop.time, **kwargs).start()  # type: ignore[arg-type]
        try:
            await story(server)
        finally:
            await server.stop()

    def run(story: Story, **kwargs: object) -> None:
        loop.run(whole(story, **kwargs))

    yield run
    asyncio.set_event_loop(None)
    loop.close()
