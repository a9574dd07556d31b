"""Routes that move models on the residency ladder, and the plan of a switch."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vllm_hotswap.access import Caller
from vllm_hotswap.api.plain_words import first_mistake
from vllm_hotswap.api.schemas import (
    CancelAnswer,
    MoveAnswer,
    NextAnswer,
    OperationAnswer,
    PinAnswer,
    PlanAnswer,
    PredictionStatus,
    UsageAnswer,
)
from vllm_hotswap.errors import InvalidRequest
from vllm_hotswap.models import Usage
from vllm_hotswap.residency import Move, OperationResult, Plan, Prediction, PredictionStats
from vllm_hotswap.switching import Coordinator
from vllm_hotswap.text import as_utf8


class Body(BaseModel):
    """The body of an operation."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NoOptions(Body):
    """Body of `load`, `unload` and `wake`: nothing, or `{}`."""


class SleepOptions(Body):
    """Body of `sleep`."""

    level: int = Field(default=1, ge=1, le=2)


class PinOptions(Body):
    """Body of `pin`."""

    pinned: bool = True


class PrefetchOptions(Body):
    """Body of `prefetch`."""

    cancel: bool = False


class NextOptions(Body):
    """Body of `POST /admin/next`."""

    model: str = Field(min_length=1)


class PlanQuery(BaseModel):
    """Query of `/admin/plan`."""

    model: str = Field(min_length=1)


Options = TypeVar("Options", bound=Body)


class MoveRoutes:
    """Handlers of `/admin/models/{alias}/{operation}`, `/admin/plan` and `/admin/next`."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def plan(self, request: Request) -> Response:
        try:
            alias = PlanQuery.model_validate(dict(request.query_params)).model
        except ValidationError:
            raise InvalidRequest(
                "the query parameter model is missing or empty; send /admin/plan?model=ALIAS",
                "model",
            ) from None
        return JSONResponse(plan_body(self._coordinator.plan(alias), self._coordinator.active))

    async def announce(self, request: Request) -> Response:
        options = parse_body(NextOptions, await request.body())
        announced = self._coordinator.operations.announce(options.model)
        body: NextAnswer = {
            "model": announced.model.alias,
            "residency": announced.model.residency.value,
            "prefetch": announced.prefetch,
            "limit_bytes": announced.limit_bytes,
            "wake": announced.wake,
        }
        return JSONResponse(body)

    async def load(self, request: Request) -> Response:
        alias, _ = await self._read(request, NoOptions)
        return JSONResponse(operation_body(await self._coordinator.operations.load(alias)))

    async def unload(self, request: Request) -> Response:
        alias, _ = await self._read(request, NoOptions)
        return JSONResponse(operation_body(await self._coordinator.operations.unload(alias)))

    async def sleep(self, request: Request) -> Response:
        alias, options = await self._read(request, SleepOptions)
        return JSONResponse(
            operation_body(await self._coordinator.operations.sleep(alias, options.level))
        )

    async def wake(self, request: Request) -> Response:
        alias, _ = await self._read(request, NoOptions)
        return JSONResponse(operation_body(await self._coordinator.operations.wake(alias)))

    async def prefetch(self, request: Request) -> Response:
        alias, options = await self._read(request, PrefetchOptions)
        if options.cancel:
            self._coordinator.operations.cancel_prefetch(alias)
            cancelled: CancelAnswer = {
                "operation": "prefetch",
                "model": alias,
                "cancelled": True,
            }
            return JSONResponse(cancelled)
        return JSONResponse(operation_body(await self._coordinator.operations.prefetch(alias)))

    async def pin(self, request: Request) -> Response:
        alias, options = await self._read(request, PinOptions)
        self._coordinator.operations.pin(alias, options.pinned)
        answer: PinAnswer = {"operation": "pin", "model": alias, "pinned": options.pinned}
        return JSONResponse(answer)

    async def _read(self, request: Request, kind: type[Options]) -> tuple[str, Options]:
        """Return the alias of the model that the path names, and the checked body."""
        options = parse_body(kind, await request.body())
        return self._coordinator.registry.model(request.path_params["alias"]).alias, options


def operation_body(result: OperationResult) -> OperationAnswer:
    """Return the result of an operation as JSON."""
    body: OperationAnswer = {
        "operation": result.operation,
        "model": result.model,
        "changed": result.changed,
        "before": result.before.value,
        "residency": result.after.value,
        "duration_ms": round(result.duration_s * 1000, 3),
        "evicted": [move_body(move) for move in result.evicted],
    }
    if result.prefetched_bytes is not None:
        body["prefetched_bytes"] = result.prefetched_bytes
    return body


def plan_body(plan: Plan, active: str | None) -> PlanAnswer:
    """Return a plan as JSON."""
    return {
        "model": plan.target,
        "active": active,
        "evict": [move_body(move) for move in plan.evictions],
        "give_up_wake": list(plan.given_up),
        "bring_up": move_body(plan.bring_up) if plan.bring_up else None,
        "cost_s": round(plan.cost_s, 3),
        "memory": {
            "budget": usage_body(plan.budget),
            "before": usage_body(plan.used_before),
            "peak": usage_body(plan.used_peak),
            "after": usage_body(plan.used_after),
        },
    }


def predictions_body(predicted: Prediction | None, stats: PredictionStats) -> PredictionStatus:
    """Return the model that is expected next, and how useful predictions were, as JSON."""
    return {
        "next": None
        if predicted is None
        else {"model": predicted.alias, "probability": round(predicted.probability, 3)},
        "hits": stats.hits,
        "misses": stats.misses,
        "used_bytes": stats.used_bytes,
        "wasted_bytes": stats.wasted_bytes,
    }


def move_body(move: Move) -> MoveAnswer:
    return {
        "model": move.alias,
        "before": move.before.value,
        "after": move.after.value,
        "frees": usage_body(move.frees),
        "cost_s": round(move.cost_s, 3),
    }


def usage_body(usage: Usage) -> UsageAnswer:
    return {"device_bytes": usage.device, "host_bytes": usage.host}


CALLER = "vllm_hotswap.caller"
"""The key in a request's scope under which our own routes find its caller."""


def caller_of(request: Request) -> Caller:
    """Return the caller of one of our own routes."""
    caller: Caller = request.scope.get(CALLER, Caller())
    return caller


def parse_body(kind: type[Options], body: bytes) -> Options:
    """Return the checked body; an empty one counts as `{}`. Raises `InvalidRequest`."""
    try:
        return kind.model_validate_json(as_utf8(body) or b"{}")
    except ValidationError as error:
        field, mistake = first_mistake(error)
        known = ", ".join(kind.model_fields) or "none"
        raise InvalidRequest(f"{mistake}; known fields: {known}", field) from None
