"""The server's own routes: which callers may use them, what they accept and answer."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.conftest import MakeServer
from tests.helpers.support import Server
from vllm_hotswap.access.roles import Access
from vllm_hotswap.config.settings import RecoveryConfig
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import FakeSettings

SWITCH = "/v1/models/switch"
MIB = 1 << 20
ADMIN = {"authorization": "Bearer admin"}
USER = {"authorization": "Bearer user"}


def sample(exposition: str, name: str) -> float:
    """Return the value of one sample of `/metrics`, named with its labels."""
    line = next(line for line in exposition.splitlines() if line.startswith(name + " "))
    return float(line.split()[-1])


# --- the switch endpoint --------------------------------------------------------------------


async def test_switch_answers_with_the_quickstarts_fields_and_ours(server: Server) -> None:
    """A switch is answered with all fields of the quickstart's server, and ours."""
    response = await server.post(SWITCH, json={"model": "qwen"})

    assert 200 == response.status_code
    body = response.json()
    assert {
        "previous_model": "llama",
        "current_model": "qwen",
        "switched": True,
        "freed_memory_mb": 0.0,
        "stash_memory_after_mb": 0.0,
        "memory_before_mb": 4.0,
        "memory_after_unload_mb": 4.0,
        "memory_after_mb": 4.0,
        "epoch": 2,
        "requests_cut": 0,
        "evicted": [],
    }.items() <= body.items()
    phases = ["validate", "drain", "make_room", "bring_up", "activate", "verify"]
    assert phases == list(body["phases"])
    assert 0 <= body["reconfigure_ms"] <= body["duration_ms"]
    assert body["operation_id"].startswith("switch-")


async def test_switch_to_the_active_model_says_that_nothing_was_done(server: Server) -> None:
    """A switch to the active model gets 200 with `switched` false, and the host gets no command."""
    response = await server.post(SWITCH, json={"model": "llama"})

    assert 200 == response.status_code
    assert (False, "llama", "llama", {}) == tuple(
        response.json()[key] for key in ("switched", "previous_model", "current_model", "phases")
    )
    assert [] == server.host.operations


async def test_switch_to_a_cold_model_shows_what_it_holds(server: Server) -> None:
    """A switch shows memory as the host reports it: before, once there was room, and at the end."""
    body = (await server.post(SWITCH, json={"model": "mistral"})).json()

    fields = ("memory_before_mb", "memory_after_unload_mb", "freed_memory_mb", "memory_after_mb")
    assert [4.0, 4.0, 0.0, 6.0] == [body[field] for field in fields]


async def test_switch_that_makes_room_shows_who_moved_and_what_that_gave_back(
    make_server: MakeServer,
) -> None:
    """A switch shows that its source was put to sleep for room, and what that released."""
    server = await make_server(load=("llama",), budget=Usage(3 * MIB))

    body = (await server.post(SWITCH, json={"model": "mistral"})).json()

    fields = ("memory_before_mb", "memory_after_unload_mb", "freed_memory_mb", "memory_after_mb")
    assert [2.0, 1.0, 1.0, 3.0] == [body[field] for field in fields]
    assert [
        {
            "model": "llama",
            "before": "active",
            "after": "asleep",
            "frees": {"device_bytes": MIB, "host_bytes": 0},
            "cost_s": 0.1,
        }
    ] == body["evicted"]


async def test_joined_calls_get_the_same_answer(server: Server) -> None:
    """Two switch calls for one target are one operation, with one answer."""
    server.host.hold("load", "mistral")
    calls = [server.switch("mistral"), server.switch("mistral")]
    await server.settled()
    server.host.release("load", "mistral")

    first, second = [(await call).json() for call in calls]

    assert first == second
    assert 1 == server.host.operations.count(("load", "mistral"))


async def test_call_for_another_target_gets_a_conflict(server: Server) -> None:
    """A switch to another target gets 409 with a message that names the operation under way."""
    server.host.hold("activate", "qwen")
    first = server.switch("qwen")
    await server.settled()

    response = await server.switch("mistral")

    assert (409, "switch_in_progress") == (response.status_code, response.json()["error"]["code"])
    server.host.release("activate", "qwen")
    assert (await first).json()["operation_id"] in response.text


async def test_unknown_target_is_refused(server: Server) -> None:
    """A switch to an unknown model gets 404 with the configured aliases."""
    response = await server.post(SWITCH, json={"model": "gpt"})

    assert 404 == response.status_code
    assert "configured: llama, qwen, mistral" in response.text


async def test_target_that_cannot_be_loaded_gets_the_cause(server: Server) -> None:
    """A failed load gets 503 with the phase, the cause and the model that is still active."""
    server.host.engines["mistral"].missing_files = True

    response = await server.post(SWITCH, json={"model": "mistral"})

    assert (503, "switch_failed") == (response.status_code, response.json()["error"]["code"])
    assert "in phase validate" in response.text
    assert "'llama' is still active" in response.text


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "the body must be a JSON object; expected"),
        (b"{", None, "the body is not valid JSON: EOF while parsing an object"),
        (b"[]", None, "the body must be a JSON object; expected"),
        (b"{}", "model", "model is missing; expected"),
        (b'{"model": ""}', "model", "model is empty; expected"),
        (b'{"model": 7}', "model", "model must be a string; expected"),
        (b'{"model": null}', "model", "model must be a string; expected"),
        (b'{"model": "qwen", "drain_timeout": -1}', "drain_timeout", "drain_timeout must be at l"),
        (b'{"model": "qwen", "drain_timeout": 1e9}', "drain_timeout", "drain_timeout must be at m"),
        (b'{"model": "qwen", "drain_timeout": "6"}', "drain_timeout", "drain_timeout must be a nu"),
        (b'{"model": "qwen", "drain_timeout": true}', "drain_timeout", "drain_timeout must be a n"),
        (b'{"model": "qwen", "drain_timeout": NaN}', "drain_timeout", "drain_timeout must be "),
        (b'{"model": "qwen", "drain_timeout": Infinity}', "drain_timeout", "drain_timeout must b"),
        (
            b'{"model": "qwen", "drain_timout": 1}',
            "drain_timout",
            "drain_timout is unknown; expected",
        ),
        (
            b'{"model": "qwen", "on_drain_timeout": "wait"}',
            "on_drain_timeout",
            "on_drain_timeout must be 'abort', 'park' or 'refuse'; expected",
        ),
    ],
)
async def test_switch_body_that_is_wrong_is_refused(
    server: Server, body: bytes, param: str | None, message: str
) -> None:
    """A wrong body gets 400: `param` is the field, the message the valid form; nothing happens."""
    response = await server.post(SWITCH, content=body)

    assert 400 == response.status_code
    error = response.json()["error"]
    assert ("invalid_request", param) == (error["code"], error["param"])
    assert error["message"].startswith(message)
    assert [] == server.host.operations


@pytest.mark.parametrize("timeout", ["0", "1", "0.5", "null", "86400"])
async def test_drain_timeout_may_be_any_sensible_number(server: Server, timeout: str) -> None:
    """`drain_timeout` may be fractional; zero means at once, null the configured value."""
    body = f'{{"model": "qwen", "drain_timeout": {timeout}}}'

    assert 200 == (await server.post(SWITCH, content=body)).status_code


# --- permissions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "headers", "status"),
    [
        (Access(), {}, 403),
        (Access(dev_mode=True), {}, 200),
        (Access(user_keys=("user",)), {}, 401),
        (Access(user_keys=("user",)), USER, 403),
        (Access(user_keys=("user",), dev_mode=True), USER, 200),
        (Access(admin_keys=("admin",), dev_mode=True), {}, 403),
        (Access(user_keys=("user",), admin_keys=("admin",)), USER, 403),
        (Access(user_keys=("user",), admin_keys=("admin",)), ADMIN, 200),
    ],
)
async def test_switching_needs_an_admin_key_or_dev_mode(
    make_server: MakeServer, access: Access, headers: dict[str, str], status: int
) -> None:
    """A refusal gives its reason, and nothing is done."""
    server = await make_server(access=access)

    response = await server.post(SWITCH, json={"model": "qwen"}, headers=headers)

    assert status == response.status_code
    assert (status == 200) == bool(server.host.operations)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/ping", 200),
        ("POST", "/ping", 200),
        ("GET", "/version", 200),
        ("GET", "/v1/models", 401),
        ("GET", "/v1/models/llama", 401),
        ("GET", "/metrics", 401),
        ("GET", "/admin/status", 401),
        ("GET", "/admin/plan", 401),
        ("GET", "/admin/events", 401),
        ("POST", "/admin/models/llama/load", 401),
        ("POST", "/v1/chat/completions", 401),
        ("POST", "/nowhere", 404),
    ],
)
async def test_key_is_needed_for_all_but_public_routes(
    make_server: MakeServer, method: str, path: str, status: int
) -> None:
    """Health and version are public; every other route, known or not, needs the user key."""
    server = await make_server(access=Access(user_keys=("user",)))

    assert status == (await server.request(method, path, b"").finish()).status


@pytest.mark.parametrize("path", ["/start_profile", "/start_profile/"])
async def test_vllms_state_changing_routes_need_the_admin_key(
    make_server: MakeServer, path: str
) -> None:
    """A user key does not open routes that change a model."""
    server = await make_server(access=Access(user_keys=("user",), admin_keys=("admin",)))

    assert 403 == (await server.post(path, headers=USER, json={})).status_code
    assert 404 == (await server.post(path, headers=ADMIN, json={})).status_code


async def test_websocket_without_a_key_is_refused(make_server: MakeServer) -> None:
    """A WebSocket without a key is refused."""
    server = await make_server(access=Access(user_keys=("user",)))
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/v1/realtime",
        "query_string": b"",
        "headers": [],
        "extensions": {"websocket.http.response": {}},
    }
    await server.app(scope, None, send)  # type: ignore[arg-type]

    assert 401 == sent[0]["status"]


async def test_lifespan_is_not_the_applications(server: Server) -> None:
    """An HTTP server that sends lifespan events gets an error: the server does this work itself."""
    with pytest.raises(RuntimeError, match="run with lifespan off"):
        await server.app({"type": "lifespan"}, None, None)  # type: ignore[arg-type]


# --- routes that read -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/models"])
async def test_model_list_has_every_alias(server: Server, path: str) -> None:
    """The model list has OpenAI's form, the file's order, and the residency of each model."""
    body = (await server.get(path)).json()

    assert "list" == body["object"]
    assert [
        ("llama", {"value": "loaded", "residency": "active", "active": True}),
        ("qwen", {"value": "loaded", "residency": "parked", "active": False}),
        ("mistral", {"value": "unloaded", "residency": "cold", "active": False}),
    ] == [(card["id"], card["status"]) for card in body["data"]]


async def test_model_card_is_vllms_with_a_status(server: Server) -> None:
    """A model card has OpenAI's fields and those that the engine adds."""
    card = (await server.get("/v1/models/llama")).json()

    assert {
        "id": "llama",
        "object": "model",
        "owned_by": "vllm",
        "parent": None,
        "root": "fake/llama",
        "max_model_len": 4096,
    }.items() <= card.items()
    assert isinstance(card["created"], int)


async def test_model_card_of_a_dead_model_says_so(server: Server) -> None:
    """The card of a dead model has `status.failed` set."""
    server.host.kill_engine("qwen")

    status = (await server.get("/v1/models/qwen")).json()["status"]

    assert {"value": "unloaded", "residency": "failed", "active": False, "failed": True} == status


async def test_model_that_is_loading_is_listed_as_loading(server: Server) -> None:
    """A model is listed as loading during its load."""
    server.host.hold("load", "mistral")
    switch = server.switch("mistral")
    await server.settled()

    assert "loading" == (await server.get("/v1/models/mistral")).json()["status"]["value"]

    server.host.release("load", "mistral")
    await switch


@pytest.mark.parametrize("path", ["/v1/models/gpt"])
async def test_card_of_an_unknown_model_is_refused(server: Server, path: str) -> None:
    """The card of an unknown model gets 404 in OpenAI's form."""
    response = await server.get(path)

    assert (404, "model_not_found") == (response.status_code, response.json()["error"]["code"])


async def test_routes_work_below_a_proxys_prefix(server: Server) -> None:
    """Routes work below a prefix (`--root-path`), with which every path then begins."""
    below: dict[str, Any] = {"root_path": "/api"}

    models = await server.request("GET", "/api/v1/models", **below).finish()
    card = await server.request("GET", "/api/v1/models/llama", **below).finish()
    version = await server.request("GET", "/api/version", **below).finish()

    assert [200, 200, 200] == [answer.status for answer in (models, card, version)]
    assert b'"id":"llama"' in card.body


async def test_status_is_a_snapshot_of_everything(server: Server) -> None:
    """The status has the active model, the held requests, and the memory of every model."""
    stream = await server.start_stream("llama")

    body = (await server.get("/admin/status")).json()

    assert {
        "active": "llama",
        "epoch": 1,
        "phase": "idle",
        "target": None,
        "waiting": 0,
        "failure": None,
    }.items() <= body.items()
    llama, mistral = body["models"]["llama"], body["models"]["mistral"]
    assert {
        "residency": "active",
        "in_flight": 1,
        "waiting": 0,
        "weights_bytes": MIB,
        "kv_bytes": MIB,
        "held": {"device_bytes": 2 * MIB, "host_bytes": 0},
        "pinned": False,
        "switch_cost_s": 0.0,
        "failed": None,
    }.items() <= llama.items()
    assert 0 <= llama["idle_s"]
    assert {
        "residency": "cold",
        "weights_bytes": MIB,
        "held": {"device_bytes": 0, "host_bytes": 0},
        "idle_s": None,
    }.items() <= mistral.items()
    assert 1 <= mistral["switch_cost_s"]
    assert 4 * MIB == body["host"]["used_bytes"]
    assert {"total": 0, "failed": 0} == body["switches"]
    await stream.finish()


async def test_status_shows_budgets_and_what_is_used_of_them(make_server: MakeServer) -> None:
    """Device memory includes the engine host's own; host memory is that of models alone."""
    asleep = FakeSettings(offloads=True)
    server = await make_server(settings={"qwen": asleep}, budget=Usage(9 * MIB, 5 * MIB))
    server.host.base_bytes = 7
    await server.operate("qwen", "sleep")

    memory = (await server.get("/admin/status")).json()["memory"]

    assert {
        "device": {"budget": 9 * MIB + 7, "used": 2 * MIB + 7, "base": 7, "others": 0},
        "host": {"budget": 5 * MIB, "used": MIB},
    } == memory


async def test_status_shows_a_model_that_died(server: Server) -> None:
    """The status shows a model that died, with the cause."""
    server.host.kill_engine("qwen", "RuntimeError: boom")

    qwen = (await server.get("/admin/status")).json()["models"]["qwen"]

    assert ("failed", "RuntimeError: boom") == (qwen["residency"], qwen["failed"])


async def test_status_counts_switches(server: Server) -> None:
    """The status counts switches that have ended, and those that failed."""
    await server.switch("qwen")
    server.host.fail_next("load", "mistral")
    await server.switch("mistral")

    assert {"total": 2, "failed": 1} == (await server.get("/admin/status")).json()["switches"]


async def test_status_shows_a_switch_under_way(server: Server) -> None:
    """The status of a switch has phase, target and the number of requests that wait for it."""
    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    held = server.ask("qwen")
    await server.settled()

    body = (await server.get("/admin/status")).json()

    assert ("activate", "qwen", 1) == (body["phase"], body["target"], body["waiting"])
    assert {"llama": 0, "qwen": 1, "mistral": 0} == {
        alias: model["waiting"] for alias, model in body["models"].items()
    }
    server.host.release("activate", "qwen")
    assert body["operation_id"] == (await switch).json()["operation_id"]
    await held


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_health_is_good_while_something_can_be_served(server: Server, path: str) -> None:
    """Health is 200 while a model is active, and during a switch."""
    assert 200 == (await server.get(path)).status_code

    server.host.hold("activate", "qwen")
    switch = server.switch("qwen")
    await server.settled()
    assert 200 == (await server.get(path)).status_code

    server.host.release("activate", "qwen")
    await switch


async def test_health_can_be_asked_with_head(server: Server) -> None:
    """Health can be requested with HEAD, as load balancers do."""
    assert 200 == (await server.request("HEAD", "/health").finish()).status


async def test_ready_tells_why_nothing_can_be_served(server: Server) -> None:
    """During recovery it is 503 with state and reason; the server is live all the time."""
    assert {"ready": True, "active": "llama", "epoch": 1} == (await server.get("/ready")).json()

    server.host.kill("the engine host was killed by signal 9")
    server.host.hold("load", "llama")
    await server.settled()

    response = await server.get("/ready")
    error = response.json()["error"]
    assert (503, "not_ready") == (response.status_code, error["code"])
    assert "the server is recovering: the engine host was killed by signal 9" in error["message"]
    assert 200 == (await server.get("/health")).status_code

    server.host.release("load", "llama")
    await server.settled()
    assert {"ready": True, "active": "llama", "epoch": 2} == (await server.get("/ready")).json()


async def test_server_that_has_given_up_is_not_live(make_server: MakeServer) -> None:
    """A server that has given up recovery is not live; the reason is shown, and stays."""
    server = await make_server(recovery=RecoveryConfig(max_restarts=0))

    server.host.kill("the engine host was killed by signal 9")
    await server.settled()

    for path in ("/health", "/ready"):
        response = await server.get(path)
        assert 503 == response.status_code
        assert "killed by signal 9; this was death 1 within 600 s" in response.text
    assert "failed" == (await server.get("/admin/status")).json()["state"]
    assert "killed by signal 9" in await server.coordinator.given_up


# --- metrics --------------------------------------------------------------------------------


async def test_metrics_are_prometheus_text(server: Server) -> None:
    """Metrics have the content type that Prometheus expects."""
    response = await server.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE hotswap_switches_total counter" in response.text


async def test_metrics_begin_with_the_first_activation(server: Server) -> None:
    """Before any switch, metrics have one epoch, the active model, and the loads of the start."""
    text = (await server.get("/metrics")).text

    assert 1 == sample(text, "hotswap_epoch")
    assert 1 == sample(text, 'hotswap_model_active{model="llama"}')
    assert 0 == sample(text, 'hotswap_model_active{model="qwen"}')
    assert 1 == sample(text, 'hotswap_loads_total{model="qwen"}')


async def test_metrics_count_switches_phases_and_requests(server: Server) -> None:
    """Metrics count switches, phases and requests by their target or model and their result."""
    await server.ask("llama")
    stream = await server.start_stream("llama", words=20)
    await server.switch("qwen", 0)
    await stream.finish()
    server.host.fail_next("load", "mistral")
    await server.switch("mistral")

    text = (await server.get("/metrics")).text

    assert 1 == sample(text, 'hotswap_switches_total{result="switched",target="qwen"}')
    assert 1 == sample(text, 'hotswap_switches_total{result="failed",target="mistral"}')
    assert 1 == sample(text, 'hotswap_switch_duration_seconds_count{target="qwen"}')
    assert 1 == sample(
        text, 'hotswap_switch_phase_duration_seconds_count{phase="drain",target="qwen"}'
    )
    assert 1 == sample(text, 'hotswap_requests_total{model="llama",result="served"}')
    assert 1 == sample(text, 'hotswap_requests_total{model="llama",result="cut"}')
    assert 2 == sample(text, "hotswap_epoch")


async def test_metrics_tell_where_models_are(server: Server) -> None:
    """Metrics show what each model holds, of which budget, and its moves by residency."""
    await server.post("/admin/models/qwen/sleep", json={"level": 1})
    await server.post("/admin/models/qwen/unload")

    text = (await server.get("/metrics")).text

    assert 1 == sample(text, 'hotswap_moves_total{model="qwen",residency="asleep"}')
    assert 1 == sample(text, 'hotswap_moves_total{model="qwen",residency="cold"}')
    assert 0 == sample(text, 'hotswap_model_device_bytes{model="qwen"}')
    assert 2 << 20 == sample(text, 'hotswap_model_device_bytes{model="llama"}')
    assert server.host.budget.device == sample(text, "hotswap_device_budget_bytes")


async def test_metrics_show_what_is_in_flight_and_waiting(server: Server) -> None:
    """Gauges for requests in flight and waiting are read at the moment of the request."""
    stream = await server.start_stream("llama")
    switch = server.switch("qwen")
    await server.settled()
    held = server.ask("qwen")
    await server.settled()

    text = (await server.get("/metrics")).text

    assert 1 == sample(text, 'hotswap_requests_in_flight{model="llama"}')
    assert 1 == sample(text, 'hotswap_requests_waiting{model="qwen"}')
    await stream.finish()
    await switch
    await held


# --- bodies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
async def test_own_routes_read_json_in_every_encoding(server: Server, encoding: str) -> None:
    """Our routes decode JSON as vLLM's do, so that a name means the same model in both."""
    switch = json.dumps({"model": "qwen"}).encode(encoding)
    pin = json.dumps({"pinned": True}).encode(encoding)

    assert 200 == (await server.post("/v1/models/switch", content=switch)).status_code
    assert 200 == (await server.post("/admin/models/qwen/pin", content=pin)).status_code


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/x-www-form-urlencoded", 200),
        ("text/plain", 415),
        ("multipart/form-data; boundary=b", 415),
    ],
)
async def test_own_routes_take_json_and_what_curl_sends(
    server: Server, content_type: str | None, status: int
) -> None:
    """Our routes accept JSON, and what `curl -d` sends, but not what only web pages send."""
    headers = {"content-type": content_type} if content_type else {}

    answer = await server.post("/v1/models/switch", content=b'{"model": "qwen"}', headers=headers)

    assert status == answer.status_code
    assert ("qwen" if status == 200 else "llama") == server.coordinator.active


async def test_own_routes_take_no_large_bodies(server: Server) -> None:
    """Our routes refuse large bodies: they parse a body in one piece, and need little."""
    answer = await server.post("/v1/models/switch", json={"model": "x" * (1 << 20)})

    assert (413, "body_too_large") == (answer.status_code, answer.json()["error"]["code"])


# --- results of requests --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "result"), [(200, "served"), (400, "refused"), (422, "refused"), (500, "failed")]
)
async def test_requests_are_counted_by_what_they_were_answered(
    server: Server, status: int, result: str
) -> None:
    """An error of the model's application is not counted as a served request."""

    async def endpoint(request: Request) -> Response:
        return Response(status_code=status)

    server.host.engines["llama"].add_route(Route("/pooling", endpoint, methods=["POST"]))
    await server.ask("llama", path="/pooling")

    text = (await server.get("/metrics")).text
    assert 1 == sample(text, f'hotswap_requests_total{{model="llama",result="{result}"}}')
    assert 1 == text.count("hotswap_requests_total{")


# --- headers --------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["模型", "型模", "modèle", "50% 型", "org/llama:8b", "a\r\nb"])
async def test_alias_in_a_header_can_be_read_back(make_server: MakeServer, alias: str) -> None:
    """An alias is percent-encoded unless visible ASCII; two aliases never look alike."""
    server = await make_server(aliases=(alias, "qwen"), load=(alias,), default=alias)

    header = (await server.ask(alias)).headers["x-hotswap-model"]

    assert header.isascii()
    assert " " not in header
    assert alias == unquote(header)


async def test_plain_alias_in_a_header_is_as_it_is(make_server: MakeServer) -> None:
    """An alias of visible ASCII is not encoded in a header."""
    server = await make_server(
        aliases=("org/llama-3:8b_q4.k",), load=(), default="org/llama-3:8b_q4.k"
    )

    answer = await server.ask("org/llama-3:8b_q4.k")

    assert "org/llama-3:8b_q4.k" == answer.headers["x-hotswap-model"]


# --- after the death of an engine -----------------------------------------------------------


@pytest.mark.parametrize("how", ["switch", "load"])
async def test_failed_model_comes_back_without_a_restart(server: Server, how: str) -> None:
    """After its engine died, a switch to it, or a load, makes a new engine in the same host."""
    server.host.kill_engine("qwen")
    await server.settled()
    failed = (await server.get("/admin/status")).json()["models"]["qwen"]
    assert "failed" == failed["residency"]

    await (server.switch("qwen") if how == "switch" else server.operate("qwen", "load"))

    now = (await server.get("/admin/status")).json()["models"]["qwen"]
    assert (how == "switch", None) == (now["residency"] == "active", now["failed"])
    assert now["residency"] in ("active", "parked")
    assert 200 == (await server.get("/health")).status_code
