"""Every route of vLLM's real applications, requested with each key through the outer one."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from tests.integration.processes import ServerProcess
from vllm_hotswap.access.roles import Access, Role
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.api.vllm_routes import VLLM_REFUSED
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo.quickstart import write
from vllm_hotswap.launch.prepare import ModelLaunch, parse_flags, prepare
from vllm_hotswap.models.routes import WEBSOCKET, ModelRoutes
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_responses import FakeResponses

MOUNTED_WITH = {
    "generate": ("llama", ("generate",)),
    "embed": ("embed", ("embed", "token_embed")),
    "classify": ("embed", ("classify", "token_classify")),
    "audio": ("llama", ("generate", "transcription", "realtime")),
}
CALLERS = {"nobody": {}, "user": {"x-api-key": "user"}, "admin": {"x-api-key": "admin"}}
LET_IN = {
    Role.PUBLIC: {"nobody", "user", "admin"},
    Role.USER: {"user", "admin"},
    Role.ADMIN: {"admin"},
    Role.ADMIN_KEY: {"admin"},
    None: set(),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelLaunch]:
    """Prepare the demo's models, with all routes that flags turn on."""
    config = load_config(write(tmp_path_factory.mktemp("models")))
    flags = ["--enable-tokenizer-info-endpoint", "--enable-offline-docs", "--enable-scale-out"]
    made = prepare(config, parse_flags(config, flags)).models
    for launch in made:
        launch.args.enable_fault_tolerance = True
        launch.args.profiler_config = launch.vllm_config.profiler_config
        launch.args.profiler_config.profiler = "torch"
    return {launch.alias: launch for launch in made}


@pytest.fixture(params=MOUNTED_WITH)
def real_routes(
    request: pytest.FixtureRequest,
    launches: dict[str, ModelLaunch],
    monkeypatch: pytest.MonkeyPatch,
) -> set[str]:
    """Return what vLLM mounts for one kind of model, including what variables turn on."""
    from vllm.entrypoints.launchers.app import build_app

    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.setenv(name, "1")
    alias, tasks = MOUNTED_WITH[request.param]
    launch = launches[alias]
    return set(lines_of(build_app(launch.args, tasks, launch.vllm_config.model_config).routes))


def lines_of(routes: Any) -> Iterator[str]:
    """Return `METHOD /path` of each route; a mounted application's path stands for all below it."""
    for route in routes:
        kind = type(route).__name__
        assert hasattr(route, "path"), f"{kind} is another kind of route, not known here"
        if kind == "Mount":
            yield f"GET {route.path}" + ("/{file:path}" if route.path == "/static" else "")
        elif kind == "APIWebSocketRoute":
            yield f"{WEBSOCKET} {route.path}"
        else:
            yield from (f"{method} {route.path}" for method in route.methods)


class KeepsEverything(FakeResponses):
    """A store that has every id, so that none is unknown to the model."""

    def __contains__(self, response_id: object, /) -> bool:
        return True

    def settle(self, response_id: str, why: str) -> None:
        pass


@pytest.fixture
async def app(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HotswapApp]:
    """An application with a model that has every route, and says that it was reached."""

    async def reached(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("reached")(scope, receive, send)

    host = FakeHost(("llama",))
    engine = host.engines["llama"]
    engine._frontend.app = reached  # type: ignore[assignment]
    engine._routes = ModelRoutes.of((), [Mount("/", reached)])
    engine._frontend.responses = KeepsEverything("llama", engine.tokens, engine._frontend._count)
    app = HotswapApp(host, Access(user_keys=("user",), admin_keys=("admin",)))
    monkeypatch.setattr(app.router.owners, "check", lambda *_: None)  # each requests its own
    await host.start()
    await app.coordinator.start(["llama"], "llama")
    yield app
    await host.stop()


def role_of(app: HotswapApp, line: str) -> Role | None:
    """Return the table's role for exactly this path: another pattern may match it, too."""
    method, _, path = line.partition(" ")
    found = [route.role for route in app.routes if route.path == path and method in route.methods]
    return found[0] if found else None


async def test_every_route_of_vllms_applications_is_decided(
    real_routes: set[str], app: HotswapApp
) -> None:
    """Every route of vLLM's applications is in the table, or refused on purpose."""
    assert "POST /tokenize" in real_routes
    assert {"POST /collective_rpc", "POST /start_profile"} <= real_routes
    assert set() == {line for line in real_routes if role_of(app, line) is None} - VLLM_REFUSED
    assert set() == {line for line in VLLM_REFUSED if role_of(app, line) is not None}


async def test_every_route_of_vllms_applications_lets_in_whom_its_role_lets_in(
    real_routes: set[str], app: HotswapApp
) -> None:
    """Every route of vLLM accepts its role; a missing, user or admin key gets the right status."""
    wrong = {
        f"{line} for {caller}: {status}"
        for line in real_routes
        if not line.startswith(WEBSOCKET)
        for caller, headers in CALLERS.items()
        if (status := await ask(app, line, headers)) not in expected(role_of(app, line), caller)
    }

    assert set() == wrong


def expected(role: Role | None, caller: str) -> set[int]:
    if caller in LET_IN[role]:
        return {200, 400}  # our own adapter routes lack their body
    return {404} if role is None else {401 if caller == "nobody" else 403}


async def ask(app: HotswapApp, line: str, headers: dict[str, str]) -> int:
    method, path = line.split()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        path = path.replace("{file:path}", "a/b.js").replace("{response_id}", "resp_1")
        return (await client.request(method, path, headers=headers)).status_code


DECLARED = re.compile(
    r'(?:router|app)\.(get|post|put|patch|delete|websocket)\(\s*"(/[^"]*)"'
    r'|add_api_route\(\s*"(/[^"]*)"'
)


def test_every_route_in_vllms_source_is_decided() -> None:
    """Every route in vLLM's source is decided, whether it is mounted or not."""
    table = HotswapApp(FakeHost(("llama",)), Access()).routes
    paths = {route.path for route in table} | {line.split()[1] for line in VLLM_REFUSED}
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "entrypoints"
    sources = [file.read_text() for file in folder.rglob("api_router.py")]
    declared = {a or b for source in sources for _, a, b in DECLARED.findall(source)}

    assert "/v1/chat/completions" in declared
    assert "/v1/realtime" in declared
    assert set() == declared - paths


@pytest.mark.parametrize("line", sorted(VLLM_REFUSED))
def test_real_server_refuses_what_is_never_to_be_reached(server: ServerProcess, line: str) -> None:
    """`VLLM_SERVER_DEV_MODE=1` does not open routes that are never to be reached."""
    method, path = line.split()
    response = server.client.request(method, path)

    assert (404, "unknown_route") == (response.status_code, response.json()["error"]["code"])


@pytest.mark.parametrize("alias", ["llama", "embed"])
def test_real_server_answers_what_it_describes(server: ServerProcess, alias: str) -> None:
    """Every route in a model's own description is in the table, or refused on purpose."""
    server.switch(alias)
    table = HotswapApp(FakeHost(("llama",)), Access())
    paths = server.client.get("/openapi.json").json()["paths"]
    lines = {f"{method.upper()} {path}" for path in paths for method in paths[path]}

    assert "POST /tokenize" in lines
    assert set() == {line for line in lines if role_of(table, line) is None} - VLLM_REFUSED
