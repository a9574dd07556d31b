"""The server's own routes: model list, switch, status, health, metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vllm_hotswap.api.handlers.leases import leases_body
from vllm_hotswap.api.handlers.residency import caller_of, move_body, predictions_body, usage_body
from vllm_hotswap.api.plain_words import first_mistake
from vllm_hotswap.api.redaction import redact_if_any
from vllm_hotswap.api.schemas import (
    MemoryStatus,
    ModelStatus,
    ReadyAnswer,
    StatusAnswer,
    SwitchAnswer,
    WakingStatus,
)
from vllm_hotswap.config import DrainAction
from vllm_hotswap.errors import EngineUnavailable, InvalidRequest, NotReady
from vllm_hotswap.models import EngineHost, HostStats, Model
from vllm_hotswap.states import Residency, ServerState
from vllm_hotswap.switching import (
    Coordinator,
    MemoryUse,
    ModelSnapshot,
    ServerSnapshot,
    SwitchResult,
    WakingSnapshot,
)
from vllm_hotswap.telemetry import metrics
from vllm_hotswap.text import as_utf8

MAX_DRAIN_TIMEOUT_S = 86_400.0
_MIB = 1 << 20
_STARTED = int(time.time())

STATUS_VALUES = {
    Residency.COLD: "unloaded",
    Residency.LOADING: "loading",
    Residency.PARKED: "loaded",
    Residency.ACTIVE: "loaded",
    Residency.ASLEEP: "sleeping",
    Residency.DISCARDED: "sleeping",
    Residency.FAILED: "unloaded",
}
"""`status.value` of a model, in the words that llama.cpp's router and llama-swap share."""


class SwitchRequest(BaseModel):
    """Body of `POST /v1/models/switch`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1)
    drain_timeout: float | None = Field(default=None, ge=0, le=MAX_DRAIN_TIMEOUT_S)
    """Seconds; None for the configured default."""
    on_drain_timeout: DrainAction | None = None
    """None for the configured default."""


class Admin:
    """Handlers of the server's own routes. They read the coordinator and call it to act."""

    def __init__(
        self, coordinator: Coordinator, host: EngineHost, registries: Sequence[CollectorRegistry]
    ) -> None:
        self._coordinator = coordinator
        self._host = host
        self._registries = registries

    async def models(self, request: Request) -> Response:
        coordinator = self._coordinator
        return JSONResponse(model_list(coordinator.registry, coordinator.active))

    async def model(self, request: Request) -> Response:
        name = request.path_params["alias"]
        model = self._coordinator.registry.owner(name)
        return JSONResponse(named_card(name, model, self._coordinator.active))

    async def switch(self, request: Request) -> Response:
        call = _parse(await request.body())
        result = await self._coordinator.switch(
            call.model, call.drain_timeout, call.on_drain_timeout, caller_of(request).key
        )
        return JSONResponse(switch_body(result))

    async def status(self, request: Request) -> Response:
        return JSONResponse(self.status_answer())

    def status_answer(self) -> StatusAnswer:
        """Return the state of the server as JSON; sizes in bytes, times in seconds."""
        return status_body(self._coordinator.snapshot(), self._host.stats())

    async def health(self, request: Request) -> Response:
        """Answer 200 while the server serves, or can recover by itself."""
        serving = self._coordinator.serving()
        if serving.state is ServerState.FAILED:
            raise EngineUnavailable(serving.failure or "")
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        serving = self._coordinator.serving()
        if not serving.is_ready:
            reason = serving.failure or f"phase {serving.phase}"
            raise NotReady(f"the server is {serving.state.value}: {reason}; retry later")
        body: ReadyAnswer = {
            "ready": True,
            "active": serving.active,
            "epoch": serving.epoch,
        }
        return JSONResponse(body)

    async def metrics(self, request: Request) -> Response:
        body = metrics.exposition(self._registries)
        return Response(body, headers={"content-type": metrics.CONTENT_TYPE})


def model_card(model: Model, active: str | None) -> dict[str, Any]:
    """Return vLLM's model card of a model, with our status; `active` is the active alias."""
    status: dict[str, Any] = {
        "value": STATUS_VALUES[model.residency],
        "residency": model.residency.value,
        "active": model.alias == active,
    }
    if model.residency is Residency.FAILED:
        status["failed"] = True
    return {
        "id": model.alias,
        "object": "model",
        "created": _STARTED,
        "owned_by": "vllm",
        "parent": None,
        **model.engine.card,
        "root": _root(model.engine.card),
        "status": status,
    }


def _root(card: Mapping[str, object]) -> str:
    """Return a model hub's name unchanged; for a folder, only its own name."""
    root = Path(str(card["root"]))
    return root.name if root.is_absolute() else str(root)


def named_card(name: str, model: Model, active: str | None) -> dict[str, Any]:
    """Return the card for a name: any name of the model, or one of its adapters."""
    card = {**model_card(model, active), "id": name}
    if (adapter := model.engine.adapters.get(name)) is None:
        return card
    failed = {"failed": True} if adapter.failure is not None else {}
    return {
        **card,
        "root": adapter.files.path.name,
        "parent": model.alias,
        "status": {**card["status"], **failed},
    }


def model_list(models: Iterable[Model], active: str | None) -> dict[str, Any]:
    """Return OpenAI's model list: every name of every configured model, whatever its residency."""
    return {
        "object": "list",
        "data": [
            named_card(name, model, active)
            for model in models
            for name in (model.alias, *model.engine.aliases, *model.engine.adapters)
        ],
    }


def switch_body(result: SwitchResult) -> SwitchAnswer:
    """Return the quickstart server's fields, then ours.

    A switch frees memory only if there is no room. `freed_memory_mb` is by how much the engine
    host's memory had shrunk by then (0 if it grew). Nothing is stashed: sleeping weights count as
    their model's.
    """
    before = result.memory_before_bytes
    return {
        "previous_model": result.previous_model,
        "current_model": result.current_model,
        "switched": result.switched,
        "duration_ms": _ms(result.duration_s),
        "reconfigure_ms": _ms(result.reconfigure_s),
        "memory_before_mb": _mb(before),
        "memory_after_unload_mb": _mb(result.memory_unloaded_bytes),
        "freed_memory_mb": _mb(max(0, before - result.memory_unloaded_bytes)),
        "stash_memory_after_mb": 0.0,
        "memory_after_mb": _mb(result.memory_after_bytes),
        "operation_id": result.operation_id,
        "epoch": result.epoch,
        "phases": {name: _ms(seconds) for name, seconds in result.phases_s.items()},
        "requests_cut": result.requests_cut,
        "requests_parked": result.requests_parked,
        "requests_lost": result.requests_lost,
        "evicted": [move_body(move) for move in result.evicted],
    }


def _parse(body: bytes) -> SwitchRequest:
    try:
        return SwitchRequest.model_validate_json(as_utf8(body) or b"null")
    except ValidationError as error:
        field, mistake = first_mistake(error)
        raise InvalidRequest(
            f'{mistake}; expected {{"model": alias, "drain_timeout": seconds, '
            '"on_drain_timeout": abort|park|refuse}',
            field,
        ) from None


def status_body(server: ServerSnapshot, host: HostStats) -> StatusAnswer:
    """Return the state of the server as JSON; sizes in bytes, times in seconds."""
    serving, switch = server.serving, server.serving.switch
    return {
        "state": serving.state.value,
        "active": serving.active,
        "epoch": serving.epoch,
        "phase": serving.phase,
        "operation_id": switch.operation_id if switch else None,
        "target": serving.target,
        "waiting": server.waiting,
        "failure": redact_if_any(serving.failure),
        "models": {model.alias: _model_status(model) for model in server.models},
        "host": {
            "is_fake": server.is_fake,
            "pid": host.pid,
            "used_bytes": host.used_bytes,
            "restarts": server.host_restarts,
        },
        "memory": _memory(server.memory),
        "switches": {"total": server.switches, "failed": server.switches_failed},
        "job_leases": leases_body(server.job_leases, server.now_s),
        "predictions": predictions_body(server.predicted, server.predictions),
    }


def _model_status(model: ModelSnapshot) -> ModelStatus:
    return {
        "residency": model.residency.value,
        "in_flight": model.in_flight,
        "parked": model.parked,
        "waiting": model.waiting,
        "weights_bytes": model.memory.weights_bytes,
        "kv_bytes": model.memory.kv_bytes,
        "held": usage_body(model.held),
        "waking": _waking(model.waking),
        "pinned": model.pinned,
        "idle_s": model.idle_s,
        "switch_cost_s": round(model.switch_cost_s, 3),
        "failed": redact_if_any(model.failure),
    }


def _waking(waking: WakingSnapshot | None) -> WakingStatus | None:
    if waking is None:
        return None
    return {"done_bytes": waking.done_bytes, "total_bytes": waking.total_bytes}


def _memory(memory: MemoryUse) -> MemoryStatus:
    """Return budgets and what models hold; for the device, with what the host itself holds."""
    return {
        "device": {
            "budget": memory.budget.device + memory.base_bytes,
            "used": memory.used.device + memory.base_bytes,
            "base": memory.base_bytes,
            "others": memory.others_bytes,
        },
        "host": {
            "budget": memory.budget.host,
            "used": memory.used.host + memory.prefetched_bytes,
        },
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _mb(size: int) -> float:
    return round(size / _MIB, 1)
