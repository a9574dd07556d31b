"""Adapters and additional names of models: listing, requests, adding and removing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import MakeServer
from tests.helpers.adapters import write_adapter_for
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.errors import HotswapError
from vllm_hotswap.testing.fake_settings import MAX_RANK

ADAPTERS = "/admin/models/{}/adapters"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that may have adapters, with two of them."""
    for name in ("pirate", "sql"):
        write_adapter_for(tmp_path / "adapters" / name, {"model.layers.0.q_proj": (8, 8)})
    return tmp_path / "adapters"


@pytest.fixture
async def server(make_server: MakeServer, folder: Path) -> Server:
    """A server on which llama, also called meta, is active; qwen is parked, mistral is cold."""
    return await make_server(further={"llama": ("meta",)}, adapter_folders=[folder])


async def add(
    server: Server, alias: str, name: str, path: str | None = None, **more: Any
) -> httpx.Response:
    body = {"name": name, "path": path or name, **more}
    return await server.post(ADAPTERS.format(alias), json=body)


async def shown(server: Server, alias: str) -> list[dict[str, Any]]:
    answer = await server.get(ADAPTERS.format(alias))
    adapters: list[dict[str, Any]] = answer.json()["adapters"]
    return adapters


# --- names ----------------------------------------------------------------------------------


async def test_every_name_is_listed_with_the_state_of_its_model(server: Server) -> None:
    """Additional names, and adapters with their parent, are listed for cold models, too."""
    await add(server, "llama", "pirate")
    await add(server, "mistral", "sql")

    cards = {card["id"]: card for card in (await server.get("/v1/models")).json()["data"]}

    assert ["llama", "meta", "pirate", "qwen", "mistral", "sql"] == list(cards)
    assert [None, None, "llama"] == [cards[n]["parent"] for n in ("llama", "meta", "pirate")]
    assert cards["llama"]["status"] == cards["meta"]["status"] == cards["pirate"]["status"]
    assert ("mistral", "cold") == (cards["sql"]["parent"], cards["sql"]["status"]["residency"])
    assert "sql" == cards["sql"]["root"]


@pytest.mark.parametrize(("name", "parent"), [("meta", None), ("pirate", "llama")])
async def test_one_name_is_shown(server: Server, name: str, parent: str | None) -> None:
    """A model card has the name that was requested."""
    await add(server, "llama", "pirate")

    card = (await server.get(f"/v1/models/{name}")).json()

    assert (name, parent) == (card["id"], card["parent"])


async def test_request_for_an_adapter_is_answered_by_its_model(server: Server) -> None:
    """An answer by an adapter has its name; metrics count the request for the model."""
    await add(server, "llama", "pirate")

    answer = (await server.ask("pirate", max_tokens=3)).json()

    assert "pirate" == answer["model"]
    assert "I am pirate," == answer["choices"][0]["message"]["content"]
    assert (
        'hotswap_requests_total{model="llama",result="served"} 1.0'
        in (await server.get("/metrics")).text
    )


async def test_request_by_a_further_name_is_answered_by_its_model(server: Server) -> None:
    """A request by an additional name is answered in the model's first name, as with vLLM."""
    answer = (await server.ask("meta", max_tokens=3)).json()

    assert "llama" == answer["model"]


async def test_adapter_of_a_model_that_is_not_active_is_refused_with_the_model(
    server: Server,
) -> None:
    """The refusal of an adapter whose model is not active names the model to switch to."""
    await add(server, "qwen", "sql")

    error = (await server.ask("sql")).json()["error"]

    assert "model_not_active" == error["code"]
    assert "'qwen' (asked for as 'sql')" in error["message"]
    assert '{"model": "qwen"}' in error["message"]


@pytest.mark.parametrize("name", ["sql", "qwen"])
async def test_a_switch_to_an_adapter_is_one_to_its_model(server: Server, name: str) -> None:
    """After a switch to an adapter, requests for it and for its model are served."""
    await add(server, "qwen", "sql")

    switched = (await server.switch(name)).json()

    assert ("llama", "qwen") == (switched["previous_model"], switched["current_model"])
    assert ["sql", "qwen"] == [
        (await server.ask(asked)).json()["model"] for asked in ("sql", "qwen")
    ]


async def test_request_for_an_adapter_of_the_target_waits_for_the_switch(server: Server) -> None:
    """A request for an adapter waits for the switch as a request for its model does."""
    await add(server, "qwen", "sql")
    server.host.hold("activate", "qwen")
    switching = server.switch("qwen")
    await server.settled()
    waiting = server.ask("sql")
    await server.settled()
    assert not waiting.done()

    server.host.release("activate", "qwen")

    assert 200 == (await switching).status_code
    assert "sql" == (await waiting).json()["model"]


async def test_plan_for_an_adapter_is_the_one_for_its_model(server: Server) -> None:
    """A plan for an adapter equals the plan for its model, since the switch does."""
    await add(server, "mistral", "sql")

    assert "mistral" == (await server.get("/admin/plan?model=sql")).json()["model"]


async def test_a_model_is_not_moved_by_the_name_of_an_adapter(server: Server) -> None:
    """An adapter's name moves nothing: unloading it would otherwise unload its model."""
    await add(server, "qwen", "sql")

    error = (await server.operate("sql", "unload")).json()["error"]

    assert "'sql' is an adapter of model 'qwen'; name the model" == error["message"]
    assert "parked" == server.residency("qwen")


@pytest.mark.parametrize("operation", ["load", "pin"])
async def test_a_model_is_moved_by_a_further_name(server: Server, operation: str) -> None:
    """An additional name moves a model as its alias does."""
    answer = (await server.operate("meta", operation)).json()

    assert "llama" == answer["model"]


# --- adding and removing ----------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["llama", "qwen", "mistral"])
async def test_adapter_is_served_from_when_it_was_added(server: Server, alias: str) -> None:
    """A new adapter is served at once, whether its model is active, parked or cold."""
    answer = (await add(server, alias, "pirate")).json()
    await server.switch(alias)

    assert {
        "operation": "add_adapter",
        "model": alias,
        "name": "pirate",
        "id": 1,
        "rank": 4,
        "failed": None,
    } == answer
    assert "pirate" == (await server.ask("pirate")).json()["model"]


async def test_adapters_outlive_the_unloading_of_their_model(server: Server) -> None:
    """Adapters survive the unloading of their model: they are the model's, not its engine's."""
    await add(server, "qwen", "sql")
    await server.operate("qwen", "unload")
    await server.switch("qwen")

    assert "sql" == (await server.ask("sql")).json()["model"]


async def test_removed_adapter_is_unknown(server: Server) -> None:
    """A removed adapter is unknown, and the model itself is still served."""
    await add(server, "llama", "pirate")

    removed = await server.call("DELETE", ADAPTERS.format("llama") + "/pirate")

    assert {
        "operation": "remove_adapter",
        "model": "llama",
        "name": "pirate",
        "in_flight": 0,
    } == removed.json()
    error = (await server.ask("pirate")).json()["error"]
    assert "model 'pirate' is not configured" in error["message"]
    assert 200 == (await server.ask("llama")).status_code


async def test_requests_of_a_removed_adapter_go_on(server: Server) -> None:
    """Requests of a removed adapter run to their end; their number is reported."""
    await add(server, "llama", "pirate")
    stream = await server.start_stream("pirate", words=5)

    removed = await server.call("DELETE", ADAPTERS.format("llama") + "/pirate")
    answer = await stream.finish()

    assert 1 == removed.json()["in_flight"]
    assert answer.is_whole


async def test_name_is_not_given_again_while_requests_run_with_it(server: Server) -> None:
    """A name is refused while requests run with it: vLLM tells adapters apart by names."""
    await add(server, "llama", "pirate")
    stream = await server.start_stream("pirate")
    await server.call("DELETE", ADAPTERS.format("llama") + "/pirate")

    refused = await add(server, "llama", "pirate", "sql")
    await stream.finish()
    accepted = await add(server, "llama", "pirate", "sql")

    assert (409, "model_in_use") == (refused.status_code, refused.json()["error"]["code"])
    assert 200 == accepted.status_code


async def test_an_id_is_never_given_twice(server: Server) -> None:
    """An id is never given twice, over all models, whatever was removed, replaced or unloaded."""
    ids = [(await add(server, "llama", "pirate")).json()["id"]]
    await server.call("DELETE", ADAPTERS.format("llama") + "/pirate")
    ids.append((await add(server, "qwen", "pirate")).json()["id"])
    ids.append((await add(server, "qwen", "pirate", "sql", in_place=True)).json()["id"])
    await server.operate("qwen", "unload")
    ids.append((await add(server, "llama", "sql")).json()["id"])

    assert len(ids) == len(set(ids))
    assert [ids[2]] == [adapter["id"] for adapter in await shown(server, "qwen")]


@pytest.mark.parametrize("name", ["llama", "qwen", "meta", "sql"])
async def test_name_of_somebody_else_is_refused(server: Server, name: str) -> None:
    """Names of models, and of other models' adapters, are refused, even for a replacement."""
    await add(server, "qwen", "sql")

    for in_place in (False, True):
        answer = await add(server, "llama", name, "pirate", in_place=in_place)
        assert (409, "name_taken") == (answer.status_code, answer.json()["error"]["code"])
    assert [] == await shown(server, "llama")


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({}, 400, "invalid_request", "name is missing; known"),
        ({"name": "a"}, 400, "invalid_request", "path is missing; known"),
        ({"name": "", "path": "sql"}, 400, "invalid_request", "name is empty; known"),
        ({"name": "a", "path": "none"}, 400, "invalid_request", "no such folder below"),
        ({"name": "a", "path": ".."}, 400, "invalid_request", "no such folder below"),
        ({"name": "a", "path": "/etc"}, 400, "invalid_request", "no such folder below"),
        ({"name": "a", "path": "link"}, 400, "invalid_request", "no such folder below"),
        ({"name": "a", "path": "\0"}, 400, "invalid_request", "no such folder below"),
        ({"name": "a", "path": "high"}, 400, "adapter_refused", "'a' has rank 17, the most is 16"),
        ({"name": "a", "path": "."}, 400, "adapter_refused", "has no adapter_config.json"),
    ],
)
async def test_adapter_that_cannot_be_added_is_refused_without_a_path(
    server: Server, folder: Path, body: dict[str, str], status: int, code: str, message: str
) -> None:
    """Refusing an adapter changes nothing, and reveals nothing about other files."""
    (folder / "link").symlink_to("/etc", target_is_directory=True)
    write_adapter_for(folder / "high", {"model.layers.0.q_proj": (8, 8)}, rank=MAX_RANK + 1)

    answer = await server.post(ADAPTERS.format("llama"), json=body)

    error = answer.json()["error"]
    assert (status, code) == (answer.status_code, error["code"])
    assert message in error["message"]
    assert str(folder) not in error["message"]
    assert "/etc" not in error["message"]
    assert [] == await shown(server, "llama")


async def test_adapter_that_the_engine_refuses_is_not_served(server: Server) -> None:
    """If the engine refuses an adapter, the model is still served, and the name is free."""
    server.host.fail_next("add_adapter", "llama", HotswapError("its shapes are wrong"))

    answer = await add(server, "llama", "pirate")

    assert (400, "adapter_refused") == (answer.status_code, answer.json()["error"]["code"])
    assert 404 == (await server.ask("pirate")).status_code
    assert 200 == (await server.ask("llama")).status_code
    assert 200 == (await add(server, "llama", "pirate")).status_code


async def test_replacement_that_the_engine_refuses_leaves_the_one_before(server: Server) -> None:
    """If the engine refuses a replacement, the earlier adapter stays, with its id."""
    await add(server, "llama", "pirate")
    server.host.fail_next("add_adapter", "llama")

    await add(server, "llama", "pirate", "sql", in_place=True)

    assert [1] == [adapter["id"] for adapter in await shown(server, "llama")]
    assert "pirate" == (await server.ask("pirate")).json()["model"]


async def test_adapter_waits_for_its_model_to_arrive_where_it_goes(server: Server) -> None:
    """An adapter added during its model's load waits for the load, and is then loaded at once."""
    server.host.hold("load", "mistral")
    loading = server.operate("mistral", "load")
    await server.settled()
    adding = asyncio.create_task(add(server, "mistral", "sql"))
    await server.settled()
    assert not adding.done()

    server.host.release("load", "mistral")

    assert [200, 200] == [(await loading).status_code, (await adding).status_code]
    assert ("add_adapter", "mistral") == server.host.operations[-1]


async def test_unknown_adapter_cannot_be_removed(server: Server) -> None:
    """The refusal to remove an unknown adapter names the model's adapters."""
    await add(server, "llama", "pirate")

    answer = await server.call("DELETE", ADAPTERS.format("llama") + "/sql")

    assert (404, "adapter_not_found") == (answer.status_code, answer.json()["error"]["code"])
    assert "adapters: pirate" in answer.json()["error"]["message"]


async def test_without_folders_nothing_can_be_added(make_server: MakeServer) -> None:
    """Without configured folders no adapter can be added; the error names the setting."""
    server = await make_server()

    answer = await add(server, "llama", "pirate")

    assert (403, "adapters_not_allowed") == (answer.status_code, answer.json()["error"]["code"])
    assert "adapters.folders" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/admin/models/llama/adapters"),
        ("DELETE", "/admin/models/llama/adapters/pirate"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
async def test_adapters_are_changed_by_admins_only(
    make_server: MakeServer, folder: Path, method: str, path: str
) -> None:
    """Adding an adapter makes the server read files: only admins may do so."""
    access = Access(user_keys=("user",), admin_keys=("admin",))
    server = await make_server(access=access, adapter_folders=[folder])

    stream = server.request(method, path, b"{}", headers=[(b"authorization", b"Bearer user")])

    assert 403 == (await stream.finish()).status


# --- vLLM's own routes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "alias"),
    [({}, "llama"), ({"model": "qwen"}, "qwen"), ({"base_model_name": "mistral"}, "mistral")],
)
async def test_vllms_route_adds_to_the_model_that_is_named_or_active(
    server: Server, more: dict[str, str], alias: str
) -> None:
    """vLLM's route adds an adapter to the named or the active model, with vLLM's answer."""
    body = {"lora_name": "sql", "lora_path": "sql", **more}

    answer = await server.post("/v1/load_lora_adapter", json=body)

    assert "Success: LoRA adapter 'sql' added successfully." == answer.text
    assert ["sql"] == [adapter["name"] for adapter in await shown(server, alias)]


async def test_vllms_route_replaces_in_place(server: Server, folder: Path) -> None:
    """An absolute path works, too; without `load_inplace` the name is taken."""
    body = {"lora_name": "sql", "lora_path": str(folder / "sql")}
    answers = [
        await server.post("/v1/load_lora_adapter", json=content)
        for content in (body, body, {**body, "load_inplace": True})
    ]

    assert [200, 409, 200] == [answer.status_code for answer in answers]


@pytest.mark.parametrize("more", [{}, {"model": "qwen"}, {"lora_int_id": 1}])
async def test_vllms_route_removes_from_the_model_that_has_it(
    server: Server, more: dict[str, Any]
) -> None:
    """vLLM's route needs no model to remove an adapter, because names of adapters are unique."""
    await add(server, "qwen", "sql")

    answer = await server.post("/v1/unload_lora_adapter", json={"lora_name": "sql", **more})

    assert "Success: LoRA adapter 'sql' removed successfully." == answer.text
    assert [] == await shown(server, "qwen")


@pytest.mark.parametrize("more", [{}, {"model": "llama"}])
async def test_vllms_route_refuses_an_unknown_adapter(server: Server, more: dict[str, str]) -> None:
    """vLLM's route refuses to remove an unknown adapter with a list of the existing ones."""
    answer = await server.post("/v1/unload_lora_adapter", json={"lora_name": "sql", **more})

    assert (404, "adapter_not_found") == (answer.status_code, answer.json()["error"]["code"])


async def test_vllms_route_needs_an_active_model_or_a_name(server: Server) -> None:
    """A route without a name fails after the active engine has died: no model is active."""
    server.host.kill_engine("llama")

    answer = await server.post(
        "/v1/load_lora_adapter", json={"lora_name": "sql", "lora_path": "sql"}
    )

    assert (503, "engine_unavailable") == (answer.status_code, answer.json()["error"]["code"])


async def test_an_adapter_that_is_asked_for_while_it_is_replaced_stays(server: Server) -> None:
    """An adapter that is requested during its replacement stays; the replacement is refused."""
    first = (await add(server, "llama", "pirate")).json()
    server.host.hold("add_adapter", "llama")
    replacing = asyncio.create_task(add(server, "llama", "pirate", "sql", in_place=True))
    await server.settled()
    stream = await server.start_stream("pirate")
    server.host.release("add_adapter", "llama")
    refused = await replacing

    assert (409, "model_in_use") == (refused.status_code, refused.json()["error"]["code"])
    assert [first["id"]] == [adapter["id"] for adapter in await shown(server, "llama")]
    assert (await stream.finish()).is_whole


@pytest.mark.parametrize("path", ["a" * 300, "circle", "a\0b", ".."])
async def test_a_path_that_is_none_is_refused(server: Server, folder: Path, path: str) -> None:
    """A path that is too long, a loop, outside the folders, or has a null byte is refused."""
    (folder / "circle").symlink_to(folder / "circle")

    answer = await add(server, "llama", "pirate", path)

    assert (400, "invalid_request") == (answer.status_code, answer.json()["error"]["code"])
