"""Routes that hold a model for a job."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vllm_hotswap.api.handlers.residency import Body, caller_of, parse_body
from vllm_hotswap.api.schemas import JobLeaseAnswer, JobLeaseList, RevokedLease
from vllm_hotswap.switching import Coordinator, JobLease


class LeaseOptions(Body):
    """Body of `POST /admin/leases`."""

    model: str = Field(min_length=1)
    owner: str = Field(min_length=1, max_length=200)
    ttl: float = Field(gt=0, lt=1e9)
    """Seconds, from when the model is active."""
    note: str = Field(default="", max_length=1000)


class RenewOptions(Body):
    """Body of `POST /admin/leases/{id}`."""

    ttl: float = Field(gt=0, lt=1e9)
    """Seconds from now."""


class JobRoutes:
    """Handlers of `/admin/leases`."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def show(self, request: Request) -> Response:
        tells_keys = caller_of(request).role == "admin"
        jobs = self._coordinator.jobs
        body: JobLeaseList = {"leases": leases_body(jobs.leases, jobs.now_s, tells_keys)}
        return JSONResponse(body)

    async def hold(self, request: Request) -> Response:
        options = parse_body(LeaseOptions, await request.body())
        lease = await self._coordinator.hold(
            options.model, options.owner, options.ttl, options.note, caller_of(request).key
        )
        return JSONResponse(lease_body(lease, self._coordinator.jobs.now_s, tells_key=True))

    async def renew(self, request: Request) -> Response:
        options, jobs = parse_body(RenewOptions, await request.body()), self._coordinator.jobs
        lease = jobs.renew(request.path_params["id"], options.ttl, caller_of(request).key)
        return JSONResponse(lease_body(lease, jobs.now_s, tells_key=True))

    async def revoke(self, request: Request) -> Response:
        jobs, key = self._coordinator.jobs, caller_of(request).key
        lease = jobs.revoke(request.path_params["id"], key)
        body: RevokedLease = {"id": lease.id, "model": lease.model, "revoked": True}
        return JSONResponse(body)


def leases_body(
    leases: Iterable[JobLease], now_s: float, tells_keys: bool = False
) -> list[JobLeaseAnswer]:
    """List job leases, as JSON."""
    return [lease_body(lease, now_s, tells_keys) for lease in leases]


def lease_body(lease: JobLease, now_s: float, tells_key: bool) -> JobLeaseAnswer:
    """Return a job lease as JSON. The key that took it is for admins alone (`tells_key`)."""
    body: JobLeaseAnswer = {
        "id": lease.id,
        "model": lease.model,
        "owner": lease.owner,
        "note": lease.note,
        "created": lease.created,
        "expires_in_s": round(lease.expires_in_s(now_s), 3),
        "pending": lease.is_pending,
    }
    if tells_key and lease.key:
        body["key"] = lease.key
    return body
