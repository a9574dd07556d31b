"""A model that is held for a job stays active until the job is done, or its time is over."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import pytest
from hypothesis import given, strategies as st

from tests.conftest import MakeServer, Play
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.errors import HotswapError, ModelLeased, UnknownLease
from vllm_hotswap.events import JobLeaseChanged, SwitchEnded
from vllm_hotswap.switching.job_leases import JobLease, JobLeases

NOW_S = 100.0


def held(*leases: JobLease) -> JobLeases:
    """Leases whose models are active since `NOW_S`."""
    table = JobLeases()
    for lease in leases:
        table.add(lease, NOW_S)
        table.begin(lease.id, NOW_S)
    return table


# --- the table of leases ----------------------------------------------------------------------


def test_nothing_is_held_without_a_lease() -> None:
    """Without a lease no model is held, and any model may be requested."""
    table = JobLeases()

    table.refuse_other("llama", NOW_S)
    assert (None, None, math.inf, []) == (table.model, table.until_s, table.next_end_s, list(table))


def test_several_jobs_may_hold_one_model() -> None:
    """A model that several jobs hold is held until the last one ends."""
    table = held(JobLease("a", "llama", "ann", 10.0), JobLease("b", "llama", "bob", 30.0))

    assert ("llama", 130.0, 110.0) == (table.model, table.until_s, table.next_end_s)
    assert ["a"] == [lease.id for lease in table.expire(110.0)]
    assert ("llama", 130.0, 130.0) == (table.model, table.until_s, table.next_end_s)
    assert ["b"] == [lease.id for lease in table.expire(200.0)]
    assert table.model is None


def test_other_model_is_refused_by_who_holds_for_longest() -> None:
    """The refusal names the longest lease's owner, the time left, and the route that ends it."""
    table = held(JobLease("a", "llama", "ann", 10.0), JobLease("b", "llama", "bob", 30.0))

    with pytest.raises(ModelLeased) as caught:
        table.add(JobLease("c", "qwen", "cay", 5.0), NOW_S + 1)

    assert caught.value.message == (
        "model 'llama' is leased to a job of 'bob' for another 29 s, so 'qwen' cannot become "
        "active; wait, or end the lease with DELETE /admin/leases/b"
    )
    assert (409, 30) == (caught.value.status, caught.value.retry_after_s)
    assert 2 == len(table)


def test_lease_has_no_end_before_its_model_is_active() -> None:
    """A lease starts when its model is active: after a load of any length, all its time is left."""
    table = JobLeases()
    table.add(JobLease("a", "llama", "ann", 10.0), NOW_S)

    assert [] == table.expire(NOW_S + 1000)
    assert 20.0 == table.renew("a", 20.0, NOW_S + 1000).expires_in_s(NOW_S + 1000)
    assert NOW_S + 1020 == table.begin("a", NOW_S + 1000).end_s


@pytest.mark.parametrize("call", ["renew", "remove", "find"])
def test_lease_that_does_not_live_is_not_known(call: str) -> None:
    """A lease that has ended is as unknown as one that never existed."""
    arguments: tuple[Any, ...] = (1.0, NOW_S) if call == "renew" else ()

    with pytest.raises(UnknownLease, match="'gone'"):
        getattr(JobLeases(), call)("gone", *arguments)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "begin", "renew", "remove", "expire"]),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["llama", "qwen"]),
        st.floats(0.1, 50.0),
    ),
    max_size=30,
)


@given(STEPS)
def test_leases_that_live_are_for_one_model(steps: list[tuple[str, str, str, float]]) -> None:
    """Live leases are all for one model, in any order of calls, and none outlives its time."""
    table, now_s = JobLeases(), NOW_S
    for step, lease_id, model, ttl_s in steps:
        now_s += 1.0
        try:
            match step:
                case "add":
                    table.add(JobLease(lease_id, model, "ann", ttl_s), now_s)
                case "begin":
                    table.begin(lease_id, now_s)
                case "renew":
                    table.renew(lease_id, ttl_s, now_s)
                case "remove":
                    table.remove(lease_id)
        except HotswapError:
            pass
        table.expire(now_s)

        assert len({lease.model for lease in table}) <= 1
        assert all(lease.end_s > now_s for lease in table)


# --- on a server ------------------------------------------------------------------------------


async def hold(server: Server, model: str, ttl: float = 60.0, **more: Any) -> httpx.Response:
    body = {"model": model, "owner": "ann", "ttl": ttl, **more}
    return await server.post("/admin/leases", json=body)


async def test_lease_is_answered_when_its_model_is_active(server: Server) -> None:
    """A lease is answered when its model is active, with its id and time; every caller sees it."""
    answer = (await hold(server, "qwen", note="nightly")).json()

    assert "qwen" == server.coordinator.active
    assert {"model": "qwen", "owner": "ann", "note": "nightly", "pending": False}.items() <= (
        answer.items()
    )
    assert 59 < answer["expires_in_s"] <= 60
    listed = (await server.get("/admin/leases")).json()["leases"]
    status = (await server.get("/admin/status")).json()["job_leases"]
    assert [answer["id"]] == [lease["id"] for lease in listed] == [lease["id"] for lease in status]
    assert 'hotswap_job_leases{model="qwen"} 1.0' in (await server.get("/metrics")).text


async def test_held_model_is_not_switched_away_from(server: Server) -> None:
    """A held model is not switched away from until its lease is revoked; a switch to it is fine."""
    lease = (await hold(server, "llama")).json()

    refused = await server.switch("qwen")
    assert (409, "model_leased") == (refused.status_code, refused.json()["error"]["code"])
    assert f"DELETE /admin/leases/{lease['id']}" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) in range(59, 62)
    assert not (await server.switch("llama")).json()["switched"]

    revoked = await server.call("DELETE", f"/admin/leases/{lease['id']}")
    assert {"id": lease["id"], "model": "llama", "revoked": True} == revoked.json()
    assert (await server.switch("qwen")).json()["switched"]


async def test_lease_for_another_model_is_refused_while_one_lives(server: Server) -> None:
    """While a lease lives, one for another model is refused; more for the same model are fine."""
    await hold(server, "llama")

    assert 409 == (await hold(server, "qwen")).status_code
    assert 200 == (await hold(server, "llama")).status_code
    assert ["llama", "llama"] == [lease.model for lease in server.coordinator.jobs.leases]


async def test_lease_whose_model_cannot_be_made_active_is_none(server: Server) -> None:
    """If its model cannot be made active there is no lease, and the caller gets the reason."""
    server.host.fail_next("activate", "qwen")

    answer = await hold(server, "qwen")

    assert (503, "switch_failed") == (answer.status_code, answer.json()["error"]["code"])
    assert [] == server.coordinator.jobs.leases
    assert 200 == (await server.switch("qwen")).status_code


async def test_model_is_held_from_the_moment_in_which_it_is_asked_for(server: Server) -> None:
    """The model is held from the call on: no switch fits between its switch and the answer."""
    server.host.hold("activate", "qwen")
    asked = asyncio.create_task(hold(server, "qwen"))
    await server.settled()

    assert [(True, 60.0)] == [
        (lease["pending"], lease["expires_in_s"])
        for lease in (await server.get("/admin/leases")).json()["leases"]
    ]
    assert 409 == (await hold(server, "mistral")).status_code
    server.host.release("activate", "qwen")
    assert not (await asked).json()["pending"]


async def test_lease_that_is_revoked_before_its_model_is_active_is_over(server: Server) -> None:
    """A lease revoked before its model is active gives its caller an error; the switch goes on."""
    server.host.hold("activate", "qwen")
    asked = asyncio.create_task(hold(server, "qwen"))
    await server.settled()
    (lease,) = server.coordinator.jobs.leases

    await server.call("DELETE", f"/admin/leases/{lease.id}")
    server.host.release("activate", "qwen")

    assert "lease_not_found" == (await asked).json()["error"]["code"]
    assert "qwen" == server.coordinator.active
    assert (await server.switch("llama")).json()["switched"]


def test_lease_expires(play: Play) -> None:
    """A lease expires by itself unless it is renewed; every change is an event."""

    async def story(server: Server) -> None:
        lease = (await hold(server, "llama", ttl=60)).json()
        await asyncio.sleep(50)
        renewed = await server.post(f"/admin/leases/{lease['id']}", json={"ttl": 30})
        assert 30 == renewed.json()["expires_in_s"]
        await asyncio.sleep(29)
        assert 409 == (await server.switch("qwen")).status_code

        await asyncio.sleep(2)
        assert 200 == (await server.switch("qwen")).status_code
        gone = await server.post(f"/admin/leases/{lease['id']}", json={"ttl": 30})
        assert (404, "lease_not_found") == (gone.status_code, gone.json()["error"]["code"])
        changes = server.events.of(JobLeaseChanged)
        assert [("granted", 60.0), ("renewed", 30.0), ("expired", 0.0)] == [
            (change.change, change.expires_in_s) for change in changes
        ]

    play(story)


def test_lease_outlives_the_engine_host(play: Play) -> None:
    """After the engine host dies, the held model is brought back and still held."""

    async def story(server: Server) -> None:
        await hold(server, "qwen")

        server.host.kill()
        await asyncio.sleep(5)

        assert "qwen" == server.coordinator.active
        assert 409 == (await server.switch("llama")).status_code

    play(story)


def test_lease_may_not_last_longer_than_the_setting_says(play: Play) -> None:
    """No lease lasts longer than the setting allows, neither at first nor when it is renewed."""

    async def story(server: Server) -> None:
        refused = await hold(server, "llama", ttl=11)
        assert (400, "ttl") == (refused.status_code, refused.json()["error"]["param"])
        assert "10 s at most (switching.max_lease)" in refused.json()["error"]["message"]

        lease = (await hold(server, "llama", ttl=10)).json()
        longer = await server.post(f"/admin/leases/{lease['id']}", json={"ttl": 11})
        assert 400 == longer.status_code

    play(story, max_lease=10.0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"owner": "ann", "ttl": 1}, "model"),
        ({"model": "llama", "ttl": 1}, "owner"),
        ({"model": "llama", "owner": "", "ttl": 1}, "owner"),
        ({"model": "llama", "owner": "ann"}, "ttl"),
        ({"model": "llama", "owner": "ann", "ttl": 0}, "ttl"),
        ({"model": "llama", "owner": "ann", "ttl": 1, "for": "x"}, "for"),
    ],
)
async def test_lease_that_is_asked_for_wrongly_is_refused(
    server: Server, body: dict[str, object], param: str
) -> None:
    """A malformed request for a lease gets 400 that names the field, and holds nothing."""
    answer = await server.post("/admin/leases", json=body)

    assert (400, param) == (answer.status_code, answer.json()["error"]["param"])
    assert [] == server.coordinator.jobs.leases


async def test_unknown_model_cannot_be_held(server: Server) -> None:
    """A lease for an unknown model gets 404, as a switch does."""
    assert "model_not_found" == (await hold(server, "gpt")).json()["error"]["code"]


async def test_users_see_leases_and_admins_make_them(make_server: MakeServer) -> None:
    """A user's key can read leases, but can neither make nor end one."""
    server = await make_server(access=Access(user_keys=("user",), admin_keys=("admin",)))
    user = {"authorization": "Bearer user"}

    assert 200 == (await server.get("/admin/leases", headers=user)).status_code
    assert 403 == (await server.call("DELETE", "/admin/leases/x", headers=user)).status_code


# --- in the mode auto -------------------------------------------------------------------------


def ended(server: Server) -> list[str]:
    return [event.target for event in server.events.of(SwitchEnded)]


def test_requests_for_other_models_wait_until_the_lease_is_over(play: Play) -> None:
    """Overdue requests for other models wait for the lease; those for the held model are served."""

    async def story(server: Server) -> None:
        await hold(server, "llama", ttl=100)
        waiting = server.ask("qwen", max_tokens=1)
        await asyncio.sleep(99)
        assert "llama" == (await server.ask("llama")).json()["model"]
        assert not waiting.done()
        assert [] == ended(server)

        assert "qwen" == (await waiting).json()["model"]
        assert 101 > float((await waiting).headers["x-hotswap-waited"]) >= 100
        assert ["qwen"] == ended(server)

    play(story, mode="auto", max_wait=1.0)


async def test_revoked_lease_lets_requests_go_on(make_server: MakeServer) -> None:
    """Revoking a lease lets waiting requests continue at once."""
    server = await make_server(mode="auto")
    lease = (await hold(server, "llama")).json()
    waiting = server.ask("qwen")
    await server.settled()
    assert not waiting.done()

    await server.call("DELETE", f"/admin/leases/{lease['id']}")

    assert "qwen" == (await waiting).json()["model"]


async def test_lease_waits_for_a_switch_that_requests_have_caused(make_server: MakeServer) -> None:
    """A lease waits for a switch that requests caused, then comes before all other waiters."""
    server = await make_server(mode="auto")
    server.host.hold("activate", "qwen")
    first = server.ask("qwen")
    await server.settled()
    asked = asyncio.create_task(hold(server, "mistral"))
    await server.settled()
    other = server.ask("llama")
    await server.settled()
    server.host.release("activate", "qwen")

    assert "mistral" == (await asked).json()["model"]
    assert 200 == (await first).status_code
    assert ["qwen", "mistral"] == ended(server)
    assert not other.done()


def test_held_model_is_brought_back_before_anybody_else_is_served(play: Play) -> None:
    """After a crash the held model comes back first, even if the first attempt fails."""

    async def story(server: Server) -> None:
        await hold(server, "llama", ttl=1000)
        for _ in range(3):
            server.host.fail_next("load", "llama")
        other = server.ask("qwen", max_tokens=1)
        await server.settled()

        server.host.kill()
        await asyncio.sleep(60)

        assert "llama" == server.coordinator.active
        assert not other.done()
        assert {"llama"} == set(ended(server))

    play(story, mode="auto")


async def test_lease_that_is_pending_holds_from_its_first_moment(make_server: MakeServer) -> None:
    """A pending lease holds its model once active: overdue requests for others cannot move it."""
    server = await make_server(mode="auto", max_wait=0.0)
    server.host.hold("activate", "qwen")
    asked = asyncio.create_task(hold(server, "qwen"))
    await server.settled()
    other = server.ask("mistral")
    await server.settled()
    server.host.release("activate", "qwen")

    assert 200 == (await asked).status_code
    await server.settled()
    assert ("qwen", ["qwen"]) == (server.coordinator.active, ended(server))
    assert not other.done()
