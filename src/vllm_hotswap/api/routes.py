"""The table of our own routes: the role that may call each, its handler, and its description."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vllm_hotswap.access import Role
from vllm_hotswap.api.handlers.adapters import (
    AdapterOptions,
    AdapterRoutes,
    LoadOptions,
    UnloadOptions,
)
from vllm_hotswap.api.handlers.leases import JobRoutes, LeaseOptions, RenewOptions
from vllm_hotswap.api.handlers.residency import (
    MoveRoutes,
    NextOptions,
    NoOptions,
    PinOptions,
    PlanQuery,
    PrefetchOptions,
    SleepOptions,
)
from vllm_hotswap.api.handlers.status import Admin, SwitchRequest
from vllm_hotswap.api.schemas import (
    AdapterList,
    AddedAdapter,
    CancelAnswer,
    JobLeaseAnswer,
    JobLeaseList,
    ModelCard,
    ModelList,
    NextAnswer,
    OperationAnswer,
    PinAnswer,
    PlanAnswer,
    ReadyAnswer,
    RemovedAdapter,
    RevokedLease,
    StatusAnswer,
    SwitchAnswer,
    VersionAnswer,
)
from vllm_hotswap.api.vllm_routes import Handler, Route, RouteDoc
from vllm_hotswap.errors import (
    AdapterRefused,
    AdaptersNotAllowed,
    DrainRefused,
    EngineUnavailable,
    InvalidRequest,
    LoadFailed,
    ModelInUse,
    ModelLeased,
    NameTaken,
    NoRoom,
    NotReady,
    SwitchFailed,
    SwitchInProgress,
    SwitchRateLimited,
    UnknownAdapter,
    UnknownLease,
    UnknownModel,
)

PUBLIC, USER, ADMIN = Role.PUBLIC, Role.USER, Role.ADMIN

MODEL = "/admin/models/{alias:path}"
OF_MODEL = (InvalidRequest, UnknownModel, EngineUnavailable)
UP = (*OF_MODEL, NoRoom, LoadFailed)
DOWN = (*OF_MODEL, ModelInUse, LoadFailed)
SWITCH = (
    InvalidRequest,
    UnknownModel,
    DrainRefused,
    ModelLeased,
    SwitchInProgress,
    SwitchRateLimited,
    SwitchFailed,
    EngineUnavailable,
)

ADDING = (*OF_MODEL, AdaptersNotAllowed, AdapterRefused, NameTaken, ModelInUse)
REMOVING = (*OF_MODEL, UnknownAdapter)

HEALTH = RouteDoc(
    "Liveness: whether the server is serving or recovering",
    media_type="",
    errors=(EngineUnavailable,),
)
MODELS = RouteDoc("All aliases, with the status of their models", ModelList)


OBSERVING = frozenset({"/metrics", "/admin/status", "/admin/events", "/admin/leases"})
"""Routes that tell about the requests of all callers."""


def for_admins(route: Route) -> Route:
    """Return the route, for admins alone if it tells about the requests of all callers."""
    if route.method == "GET" and route.path in OBSERVING:
        return replace(route, role=Role.ADMIN_KEY)
    return route


def own_routes(
    admin: Admin,
    moves: MoveRoutes,
    adapters: AdapterRoutes,
    jobs: JobRoutes,
    version: Handler,
    events: Handler,
    description: Handler,
) -> Iterator[Route]:
    """Yield our own routes, in the order of the description, each with a line on what it does."""
    yield Route("GET", "/health", PUBLIC, admin.health, HEALTH)
    yield Route("GET", "/ping", PUBLIC, admin.health, HEALTH)
    yield Route("POST", "/ping", PUBLIC, admin.health, HEALTH)
    doc = RouteDoc("Readiness: whether requests are being served", ReadyAnswer, errors=(NotReady,))
    yield Route("GET", "/ready", PUBLIC, admin.ready, doc)
    doc = RouteDoc("vLLM's version", VersionAnswer)
    yield Route("GET", "/version", PUBLIC, version, doc)
    doc = RouteDoc("Prometheus metrics of all models and of switching", media_type="text/plain")
    yield Route("GET", "/metrics", USER, admin.metrics, doc)
    yield Route("GET", "/v1/models", USER, admin.models, MODELS)
    yield Route("GET", "/models", USER, admin.models, MODELS)
    doc = RouteDoc("One alias, with the status of its model", ModelCard, errors=(UnknownModel,))
    yield Route("GET", "/v1/models/{alias:path}", USER, admin.model, doc)
    doc = RouteDoc("Make a model the active one", SwitchAnswer, SwitchRequest, True, errors=SWITCH)
    yield Route("POST", "/v1/models/switch", ADMIN, admin.switch, doc)
    doc = RouteDoc("A snapshot of the server", StatusAnswer)
    yield Route("GET", "/admin/status", USER, admin.status, doc)
    doc = RouteDoc(
        "What a switch would do, move and cost",
        PlanAnswer,
        query=PlanQuery,
        errors=(*OF_MODEL, NoRoom),
    )
    yield Route("GET", "/admin/plan", USER, moves.plan, doc)
    doc = RouteDoc("Announce the next model", NextAnswer, NextOptions, True, errors=OF_MODEL)
    yield Route("POST", "/admin/next", ADMIN, moves.announce, doc)
    doc = RouteDoc("A snapshot, then every event as it happens", media_type="text/event-stream")
    yield Route("GET", "/admin/events", USER, events, doc)
    doc = RouteDoc("This description", dict)
    yield Route("GET", "/admin/openapi.json", USER, description, doc)
    yield from _jobs(jobs)
    yield from _moves(moves)
    yield from _adapters(adapters)


def _jobs(jobs: JobRoutes) -> Iterator[Route]:
    doc = RouteDoc("List job leases", JobLeaseList)
    yield Route("GET", "/admin/leases", USER, jobs.show, doc)
    doc = RouteDoc(
        "Lease a model for a job, once it is active",
        JobLeaseAnswer,
        LeaseOptions,
        True,
        errors=(*SWITCH, UnknownLease),
    )
    yield Route("POST", "/admin/leases", ADMIN, jobs.hold, doc)
    known = (InvalidRequest, UnknownLease)
    doc = RouteDoc("Renew a job lease", JobLeaseAnswer, RenewOptions, True, errors=known)
    yield Route("POST", "/admin/leases/{id}", ADMIN, jobs.renew, doc)
    doc = RouteDoc("End a lease", RevokedLease, errors=(UnknownLease,))
    yield Route("DELETE", "/admin/leases/{id}", ADMIN, jobs.revoke, doc)


def _moves(moves: MoveRoutes) -> Iterator[Route]:
    doc = RouteDoc("Load a model, up to `parked`", OperationAnswer, NoOptions, errors=UP)
    yield Route("POST", f"{MODEL}/load", ADMIN, moves.load, doc)
    doc = RouteDoc("Wake a sleeping model, up to `parked`", OperationAnswer, NoOptions, errors=UP)
    yield Route("POST", f"{MODEL}/wake", ADMIN, moves.wake, doc)
    doc = RouteDoc("Unload a model", OperationAnswer, NoOptions, errors=DOWN)
    yield Route("POST", f"{MODEL}/unload", ADMIN, moves.unload, doc)
    doc = RouteDoc(
        "Put a model to sleep",
        OperationAnswer,
        SleepOptions,
        errors=(*DOWN, NoRoom),
    )
    yield Route("POST", f"{MODEL}/sleep", ADMIN, moves.sleep, doc)
    doc = RouteDoc(
        "Start or cancel a prefetch of a model's files",
        OperationAnswer | CancelAnswer,
        PrefetchOptions,
        errors=(*OF_MODEL, LoadFailed),
    )
    yield Route("POST", f"{MODEL}/prefetch", ADMIN, moves.prefetch, doc)
    doc = RouteDoc("Pin or unpin a model", PinAnswer, PinOptions, errors=OF_MODEL)
    yield Route("POST", f"{MODEL}/pin", ADMIN, moves.pin, doc)


def _adapters(adapters: AdapterRoutes) -> Iterator[Route]:
    path = f"{MODEL}/adapters"
    doc = RouteDoc("The adapters of a model", AdapterList, errors=(UnknownModel,))
    yield Route("GET", path, USER, adapters.show, doc)
    doc = RouteDoc("Add an adapter to a model", AddedAdapter, AdapterOptions, True, errors=ADDING)
    yield Route("POST", path, ADMIN, adapters.add, doc)
    doc = RouteDoc("Remove an adapter", RemovedAdapter, errors=REMOVING)
    yield Route("DELETE", f"{path}/{{name:path}}", ADMIN, adapters.remove, doc)
    doc = RouteDoc(
        "vLLM's route to add one", None, LoadOptions, True, errors=ADDING, media_type="text/plain"
    )
    yield Route("POST", "/v1/load_lora_adapter", ADMIN, adapters.load_as_vllm, doc)
    doc = RouteDoc(
        "vLLM's route to remove one",
        None,
        UnloadOptions,
        True,
        errors=REMOVING,
        media_type="text/plain",
    )
    yield Route("POST", "/v1/unload_lora_adapter", ADMIN, adapters.unload_as_vllm, doc)
