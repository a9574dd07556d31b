"""The adapters of one vLLM engine: their numbers, and which of them it has loaded or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch import (
    adapter_request,
    check_adapter,
    load_adapter,
    serve_adapter,
    stop_serving,
)
from vllm_hotswap.models import Adapter, AdapterFiles
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """How adapters reach vLLM: the client of an engine, and its frontend's list of models."""

    client: Any
    models: Any


class AdapterSet:
    """The adapters with which one model is served.

    The mutable state is `_adapters` and `_loaded`, the numbers of those that the engine has loaded
    once: after a reload it loads them again by itself, when a request asks for them.

    Each adapter gets its own link for vLLM. vLLM shares KV memory between adapters with the same
    name and path, so replaced files would be served with KV memory of the old ones.
    """

    def __init__(self, vllm_config: Any, links: Path, number: Callable[[], int]) -> None:
        self._vllm_config = vllm_config
        self._links = links
        self._number = number
        self._adapters: dict[str, Adapter] = {}
        self._loaded: set[int] = set()

    def __repr__(self) -> str:
        return f"<AdapterSet {list(self._adapters)}>"

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self._adapters

    def check(self, files: AdapterFiles) -> None:
        """Run vLLM's own check, without an engine. Raises `ConfigError`."""
        check_adapter(files.name, files.path, self._vllm_config)

    def put(self, files: Iterable[AdapterFiles]) -> None:
        """Add adapters before there is a frontend."""
        for file in files:
            self._adapters[file.name] = Adapter(file, self._number())

    async def add(
        self,
        files: AdapterFiles,
        target: AdapterTarget | None,
        now: bool,
        check: Callable[[], None],
    ) -> Adapter:
        """Serve an adapter, loaded at once or later, unless `check` raises just before.

        Raises:
            ConfigError: the engine cannot load it; the adapter served under its name stays.
        """
        adapter = Adapter(files, self._number())
        if target is not None and now:
            await self._load(adapter, target)
        check()  # no await from here on: what it checks must hold when the adapter is served
        if target is not None:
            serve_adapter(target.models, self._request(adapter))
        self._adapters[files.name] = adapter
        return adapter

    def remove(self, name: str, target: AdapterTarget | None) -> None:
        del self._adapters[name]
        if target is not None:
            stop_serving(target.models, name)

    async def load_all(self, target: AdapterTarget) -> None:
        """Load adapters that were never loaded; keep those that fail, with the reason."""
        for adapter in list(self._adapters.values()):
            if adapter.id not in self._loaded:
                failure = await self._failure(adapter, target)
                if self._adapters.get(adapter.files.name) is adapter:  # not removed or replaced
                    self._settle(adapter, failure, target)

    async def _failure(self, adapter: Adapter, target: AdapterTarget) -> str | None:
        """Load an adapter. Return why the engine cannot load it; None if it has."""
        try:
            await self._load(adapter, target)
        except ConfigError as error:
            name = value_text(adapter.files.name)
            log.error("event=adapter_failed adapter=%s cause=%r", name, error.message)
            return error.message
        return None

    def _settle(self, adapter: Adapter, failure: str | None, target: AdapterTarget) -> None:
        name = adapter.files.name
        self._adapters[name] = replace(adapter, failure=failure)
        if failure is None:
            serve_adapter(target.models, self._request(adapter))
        else:
            stop_serving(target.models, name)

    async def _load(self, adapter: Adapter, target: AdapterTarget) -> None:
        await load_adapter(target.client, self._request(adapter))
        self._loaded.add(adapter.id)

    def _request(self, adapter: Adapter) -> Any:
        files = adapter.files
        return adapter_request(files.name, adapter.id, self._link(adapter), files.is_3d)

    def _link(self, adapter: Adapter) -> Path:
        self._links.mkdir(exist_ok=True)
        link = self._links / str(adapter.id)
        if not link.is_symlink():
            link.symlink_to(adapter.files.path, target_is_directory=True)
        return link
