"""One engine host per backend, in the test's own process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.helpers.cores import on_cores, share_of_cores
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo.quickstart import write
from vllm_hotswap.models.engine import EngineHost
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_settings import FakeSettings

ALIASES = ("llama", "qwen")


@pytest.fixture(scope="module", params=["fake", pytest.param("vllm", marks=pytest.mark.vllm)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineHost]:
    """Return a started host with nothing loaded."""
    with on_cores(share_of_cores()):
        made = fake_host() if backend == "fake" else vllm_host(tmp_path_factory.mktemp("models"))
        await made.start()
        yield made
        await made.stop()


def fake_host() -> EngineHost:
    return FakeHost(ALIASES, {alias: FakeSettings(token_s=0.001) for alias in ALIASES})


def vllm_host(folder: Path) -> EngineHost:
    from vllm_hotswap.engines.link import HostLink
    from vllm_hotswap.engines.vllm_host import VllmHost
    from vllm_hotswap.launch.prepare import parse_flags, prepare

    link = HostLink()
    link.spawn()
    path = write(folder)
    text = path.read_text().replace("model: ./llama\n", "model: ./llama\n    enable_lora: true\n")
    path.write_text(text)
    config = load_config(path)
    launch = prepare(config, parse_flags(config, []))
    return VllmHost(link, [model for model in launch.models if model.alias in ALIASES])


@pytest.fixture(autouse=True, scope="module")
def same_environment() -> Iterator[None]:
    """Restore variables that vLLM's platform code sets: later tests must not see them."""
    with pytest.MonkeyPatch.context() as patch:
        import os

        before = dict(os.environ)
        yield
        for name in set(os.environ) - set(before):
            patch.delenv(name)
        for name, value in before.items():
            os.environ[name] = value
