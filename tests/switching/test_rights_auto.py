"""Which requests may cause a switch, on a server in the mode `auto`."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.conftest import MakeServer
from tests.helpers.support import CHAT, Server
from vllm_hotswap.access.keys import Keys, KeySource
from vllm_hotswap.access.rights import Group, Rights
from vllm_hotswap.access.roles import Access
from vllm_hotswap.events import RequestEnded, SwitchEnded
from vllm_hotswap.models.registry import ModelSettings


def group(rights: Rights, *keys: str) -> Group:
    place = f"rights.{rights.group}"
    return Group(rights, place, KeySource(Keys.of(keys, place)))


ACCESS = Access(
    user_keys=["user"],
    admin_keys=["admin"],
    groups=[
        group(Rights("team", max_priority=5, min_max_wait_s=2.0), "team"),
        group(Rights("some", frozenset(["qwen"])), "some"),
        group(Rights("none", frozenset()), "none"),
        group(Rights(switch_to=frozenset())),
    ],
)


@pytest.fixture
async def auto(make_server: MakeServer) -> Server:
    """A server with keys of different rights: llama is active, qwen parked, mistral cold."""
    return await make_server(
        mode="auto", access=ACCESS, model_settings={"mistral": ModelSettings(priority=8)}
    )


def ask(
    server: Server, model: str | None, key: str, **headers: str
) -> asyncio.Task[httpx.Response]:
    named = {f"x-hotswap-{name.replace('_', '-')}": value for name, value in headers.items()}
    body = {} if model is None else {"model": model}
    call = server.post(CHAT, json=body, headers={"authorization": f"Bearer {key}", **named})
    return asyncio.create_task(call)


@pytest.mark.parametrize(
    ("key", "models"),
    [
        ("team", ["llama", "qwen", "mistral"]),
        ("some", ["llama", "qwen"]),
        ("none", ["llama"]),
        ("user", ["llama"]),
        ("admin", ["llama", "qwen", "mistral"]),
    ],
)
async def test_request_causes_a_switch_if_its_key_may(
    make_server: MakeServer, key: str, models: list[str]
) -> None:
    """Every key may use the active model; keys in no group have the rights of `default`."""
    served = []
    for model in ("llama", "qwen", "mistral"):
        server = await make_server(mode="auto", access=ACCESS)
        answer = await ask(server, model, key)
        assert answer.status_code in (200, 403)
        served += [model] * (answer.status_code == 200)

    assert models == served


async def test_refusal_names_the_model_and_the_rule(auto: Server) -> None:
    """A request without the right is refused at once with model and rule, and nothing switches."""
    refused = await ask(auto, "mistral", "some")

    assert (403, "switch_not_allowed") == (refused.status_code, refused.json()["error"]["code"])
    assert (
        "this key may not trigger a switch to 'mistral' (rights.some.switch_to); 'llama' is "
        "active, or about to be; use another model, or retry when 'mistral' is active"
    ) == refused.json()["error"]["message"]
    assert [] == auto.events.of(SwitchEnded)


async def test_somebody_elses_switch_serves_everybody(auto: Server) -> None:
    """A request that may not cause a switch may wait for one that another caused."""
    auto.host.hold("activate", "qwen")
    first = ask(auto, "qwen", "team")
    await auto.settled()
    second = ask(auto, "qwen", "none")
    await auto.settled()
    auto.host.release("activate", "qwen")

    assert [200, 200] == [(await first).status_code, (await second).status_code]


async def test_request_does_not_cause_a_switch_back(auto: Server) -> None:
    """Without the right, a request causes no switch back, be it sent during the drain or before."""
    auto.host.hold("step", "llama")
    running = ask(auto, "llama", "team")
    await auto.settled()
    switching = ask(auto, "qwen", "team")
    await auto.settled()
    auto.host.hold("activate", "qwen")
    auto.host.release("step", "llama")
    assert 200 == (await running).status_code
    await auto.settled()
    assert "qwen" == auto.coordinator.serving().target

    late = await ask(auto, "llama", "none")

    assert 403 == late.status_code
    auto.host.release("activate", "qwen")
    assert 200 == (await switching).status_code
    assert ["qwen"] == [event.target for event in auto.events.of(SwitchEnded)]


async def test_who_waited_while_the_model_was_active_is_told(make_server: MakeServer) -> None:
    """A request without the right is refused if `fifo` kept it waiting and its model has gone."""
    server = await make_server(mode="auto", policy="fifo", access=ACCESS)
    server.host.hold("step", "llama")
    running = ask(server, "llama", "team")
    await server.settled()
    other, waiting = ask(server, "qwen", "team"), ask(server, "llama", "none")
    await server.settled()
    server.host.release("step", "llama")

    assert [200, 200, 403] == [(await asked).status_code for asked in (running, other, waiting)]


async def test_request_without_a_model_needs_no_right(auto: Server) -> None:
    """A request without a model needs no right: it goes to the active model."""
    assert 200 == (await ask(auto, None, "none")).status_code


@pytest.mark.parametrize(
    ("model", "key", "asked", "counts"),
    [
        ("llama", "team", "3", "3"),
        ("llama", "team", "50", "5"),
        ("llama", "admin", "50", "50"),
        ("llama", "user", "-7", "-7"),
        ("llama", "user", "1", "0"),
        ("mistral", "team", "50", "8"),
    ],
)
async def test_answer_tells_the_priority_that_counts(
    auto: Server, model: str, key: str, asked: str, counts: str
) -> None:
    """The response names the priority that counts: the group's highest, or the model's."""
    answer = await ask(auto, model, key, priority=asked)

    assert counts == answer.headers["x-hotswap-priority"]
    assert [int(counts)] == [event.priority for event in auto.events.of(RequestEnded)]


async def test_answer_is_silent_about_a_priority_that_nobody_asked_for(auto: Server) -> None:
    """A request without a priority has its model's priority and wait, and no header says so."""
    answer = await ask(auto, "mistral", "team")

    assert "x-hotswap-priority" not in answer.headers
    (ended,) = auto.events.of(RequestEnded)
    assert (8, 30.0) == (ended.priority, ended.max_wait_s)


async def test_wait_that_is_too_short_for_the_group_is_longer(auto: Server) -> None:
    """A requested wait below the group's minimum is raised; a longer one stays."""
    await ask(auto, "llama", "team", max_wait="0.1")
    await ask(auto, "llama", "team", max_wait="9.5")
    await ask(auto, "llama", "user", max_wait="0.1")

    waits_s = [event.max_wait_s for event in auto.events.of(RequestEnded)]
    assert [2.0, 9.5, 5.0] == pytest.approx(waits_s)


@pytest.mark.parametrize("mode", ["auto", "manual"])
@pytest.mark.parametrize("headers", [{"priority": "high"}, {"max_wait": "soon"}])
async def test_header_that_is_wrong_is_refused(
    make_server: MakeServer, mode: str, headers: dict[str, str]
) -> None:
    """A wrong header is refused in both modes, so a change of mode breaks no client."""
    server = await make_server(mode=mode)
    (name,) = headers

    refused = await ask(server, "llama", "any", **headers)

    header = f"x-hotswap-{name.replace('_', '-')}"
    assert (400, header) == (refused.status_code, refused.json()["error"]["param"])


async def test_request_with_a_higher_priority_goes_first(make_server: MakeServer) -> None:
    """A request with a higher priority is served before one that has waited longer."""
    server = await make_server(mode="auto", access=ACCESS)
    server.host.hold("step", "llama")
    running = ask(server, "llama", "team")
    await server.settled()
    first, urgent = ask(server, "qwen", "team"), ask(server, "mistral", "team", priority="5")
    await server.settled()
    server.host.release("step", "llama")
    await asyncio.gather(running, first, urgent)

    assert ["mistral", "qwen"] == [event.target for event in server.events.of(SwitchEnded)]
