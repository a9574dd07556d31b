"""Routes that add and remove adapters while the server runs: ours, and vLLM's two.

They make the server read files. So a folder must lie below one that the operator has named, and no
response contains a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from vllm_hotswap.api.handlers.residency import Body, parse_body
from vllm_hotswap.api.redaction import redact_if_any
from vllm_hotswap.api.relay import in_header
from vllm_hotswap.errors import (
    AdaptersNotAllowed,
    EngineUnavailable,
    InvalidRequest,
    UnknownAdapter,
)
from vllm_hotswap.models import MODEL_HEADER, Adapter
from vllm_hotswap.switching import Coordinator


class AdapterOptions(Body):
    """Body of `POST /admin/models/{alias}/adapters`."""

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    in_place: bool = False
    is_3d_lora_weight: bool = False


class LoadOptions(Body):
    """Body of vLLM's `/v1/load_lora_adapter`, with the model that gets the adapter."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    model: str | None = None
    base_model_name: str | None = None


class UnloadOptions(Body):
    """Body of vLLM's `/v1/unload_lora_adapter`."""

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None
    model: str | None = None
    base_model_name: str | None = None


class AdapterRoutes:
    """Handlers of these routes. Adapters must lie below one of `folders`."""

    def __init__(self, coordinator: Coordinator, folders: Sequence[Path]) -> None:
        self._coordinator = coordinator
        self._folders = [folder.resolve() for folder in folders]

    async def show(self, request: Request) -> Response:
        model = self._coordinator.registry.model(request.path_params["alias"])
        adapters = [adapter_body(adapter) for adapter in model.engine.adapters.values()]
        return JSONResponse({"model": model.alias, "adapters": adapters})

    async def add(self, request: Request) -> Response:
        options = parse_body(AdapterOptions, await request.body())
        folder = self._folder(options.path, "path")
        adapter = await self._coordinator.operations.add_adapter(
            request.path_params["alias"],
            options.name,
            folder,
            options.is_3d_lora_weight,
            options.in_place,
        )
        owner = self._coordinator.registry.owner(options.name)
        return JSONResponse(
            {"operation": "add_adapter", "model": owner.alias, **adapter_body(adapter)}
        )

    async def remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        model = self._coordinator.registry.model(request.path_params["alias"])
        in_flight = self._coordinator.operations.remove_adapter(model.alias, name)
        return JSONResponse(
            {
                "operation": "remove_adapter",
                "model": model.alias,
                "name": name,
                "in_flight": in_flight,
            }
        )

    async def load_as_vllm(self, request: Request) -> Response:
        """Handle vLLM's route. Without a model, the active one gets the adapter."""
        options = parse_body(LoadOptions, await request.body())
        folder = self._folder(options.lora_path, "lora_path")
        alias = options.model or options.base_model_name or self._coordinator.active
        if alias is None:
            raise EngineUnavailable("no model is active; name one in model")
        name, is_3d = options.lora_name, options.is_3d_lora_weight
        await self._coordinator.operations.add_adapter(
            alias, name, folder, is_3d, options.load_inplace
        )
        return self._answer(alias, f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_as_vllm(self, request: Request) -> Response:
        """Handle vLLM's route. Without a model, it is the one that has the adapter."""
        options = parse_body(UnloadOptions, await request.body())
        name = options.lora_name
        alias = options.model or options.base_model_name or self._owner(name)
        self._coordinator.operations.remove_adapter(alias, name)
        return self._answer(alias, f"Success: LoRA adapter '{name}' removed successfully.")

    def _answer(self, alias: str, text: str) -> Response:
        """Answer in vLLM's words; a header names the model that has changed."""
        model = self._coordinator.registry.model(alias)
        return PlainTextResponse(text, headers={MODEL_HEADER: in_header(model.alias).decode()})

    def _owner(self, name: str) -> str:
        for model in self._coordinator.registry:
            if name in model.engine.adapters:
                return model.alias
        known = [name for model in self._coordinator.registry for name in model.engine.adapters]
        raise UnknownAdapter(None, name, known)

    def _folder(self, path: str, field: str) -> Path:
        """Resolve a path to a folder below one of those that are allowed."""
        if not self._folders:
            raise AdaptersNotAllowed(
                "adapters cannot be added while the server runs; list the folders they may be in "
                "under adapters.folders of the configuration"
            )
        for folder in self._folders:
            try:
                found = (folder / path).resolve()  # links are followed first
                if found.is_relative_to(folder) and found.is_dir():
                    return found
            except (OSError, RuntimeError, ValueError):  # too long, links in a circle, a null byte
                continue
        raise InvalidRequest(f"{field}: there is no such folder below adapters.folders", field)


def adapter_body(adapter: Adapter) -> dict[str, Any]:
    """Return an adapter as JSON."""
    return {
        "name": adapter.files.name,
        "id": adapter.id,
        "rank": adapter.files.rank,
        "failed": redact_if_any(adapter.failure),
    }
