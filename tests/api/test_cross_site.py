"""Pages of other origins, or under foreign host names, can change nothing.

Requests have the headers that browsers send, on a connection to the real server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import pytest
from starlette.datastructures import Headers

from tests.helpers.serving import flags
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.api.cross_site import SAFE_METHODS, CrossSite
from vllm_hotswap.api.vllm_routes import Route
from vllm_hotswap.config.settings import SwitchingConfig
from vllm_hotswap.connections.listen import Listener, ListenFlags
from vllm_hotswap.errors import CrossOriginRefused, HostRefused
from vllm_hotswap.models.routes import WEBSOCKET
from vllm_hotswap.server import run as server
from vllm_hotswap.system.log_lines import escape_records
from vllm_hotswap.telemetry.progress import StartupProgress
from vllm_hotswap.testing.fake_host import FakeHost

PLAIN, FORM = "text/plain;charset=UTF-8", "application/x-www-form-urlencoded"
CROSS = {"Sec-Fetch-Site": "cross-site"}
SAME_SITE = {"Sec-Fetch-Site": "same-site"}
CORS, NO_CORS = {"Sec-Fetch-Mode": "cors"}, {"Sec-Fetch-Mode": "no-cors"}
NAVIGATE = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}

Make = Callable[..., Any]


@dataclass
class Running:
    """A server on a port of loopback, and its client, which sends exactly the given requests."""

    app: HotswapApp
    port: int
    serving: asyncio.Task[int]

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def elsewhere(self) -> str:
        """The origin of a page on the same machine, on another port."""
        return f"http://127.0.0.1:{self.port + 1}"

    async def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        host: str | None = "",
    ) -> tuple[int, Any]:
        """Return status and body. `host` is `Host`: this server's if empty, none if None."""
        lines = [f"{method} {path} HTTP/1.{0 if host is None else 1}"]
        given = {} if host is None else {"Host": host or f"127.0.0.1:{self.port}"}
        given |= {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
        lines += [f"{name}: {value}" for name, value in given.items()]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        async with asyncio.timeout(30):  # an admitted request may wait for ever
            head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return int(head.split()[1]), content

    async def upgrade(self, path: str, headers: Mapping[str, str]) -> int:
        """Return the status of a WebSocket's handshake."""
        given = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        lines += [f"{name}: {value}" for name, value in {**given, **key, **headers}.items()]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write("\r\n".join([*lines, "", ""]).encode())
        status = int((await reader.readline()).split()[1])
        writer.close()
        await writer.wait_closed()
        return status

    def state(self) -> Any:
        """Return all state that a request could change."""
        coordinator = self.app.coordinator
        models = [(m.alias, m.residency, m.pinned, m.engine.adapters) for m in coordinator.registry]
        return (
            coordinator.active,
            coordinator.epoch,
            coordinator.snapshot().switches,
            repr(models),
        ), tuple(coordinator.jobs.leases)


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Starts a server on which every client may switch, as with `VLLM_SERVER_DEV_MODE`."""
    running: list[Running] = []

    async def start(
        access: Access | None = None,
        hosts: tuple[str, ...] = (),
        mode: Literal["manual", "auto"] = "manual",
        **given: Any,
    ) -> Running:
        access = access or Access(dev_mode=True)
        listen = ListenFlags(allowed_hosts=hosts)
        listener = Listener.open(flags(**given))
        cross_site = server.cross_site_of(access, listener, listen)
        switching = SwitchingConfig(mode=mode)
        host = FakeHost(("llama", "qwen", "cold"))
        app = HotswapApp(host, access, switching, cross_site=cross_site)
        load = ["llama", "qwen"]
        progress = StartupProgress(load)
        serving = asyncio.create_task(server.serve(app, listener, load, "llama", progress))
        assert listener.port is not None
        running.append(Running(app, listener.port, serving))
        while True:
            try:
                await running[-1].send("GET", "/health", host=None)
            except ConnectionError:
                await asyncio.sleep(0)
            else:
                return running[-1]

    yield start
    os.kill(os.getpid(), signal.SIGTERM)
    assert [0] * len(running) == [await each.serving for each in running]


def changing(app: HotswapApp) -> list[Route]:
    """Return our own routes in the table that may change something."""
    return [r for r in app.routes if r.handler is not None and r.method not in SAFE_METHODS]


def path_of(route: Route) -> str:
    return re.sub(r"\{alias:path\}", "qwen", re.sub(r"\{(id|name:path)\}", "x", route.path))


PAGES = {
    "a text": {**CROSS, **NO_CORS, "Content-Type": PLAIN},
    "a text, on another port": {**SAME_SITE, **NO_CORS, "Content-Type": PLAIN},
    "a form": {**CROSS, **NAVIGATE, "Content-Type": FORM},
    "JSON that a preflight let through": {**CROSS, **CORS, "Content-Type": "application/json"},
    "JSON of a browser that tells the origin alone": {"Content-Type": "application/json"},
}
"""Headers of a page on another origin. UI-13."""


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("origin", ["other port", "other site", "null"])
async def test_a_page_of_another_origin_changes_nothing(
    make: Make, page: str, origin: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Pages of other origins are refused on all our routes with a body, and each is logged."""
    running = await make()
    origins = {"other port": running.elsewhere, "other site": "https://evil.example"}
    headers = {**PAGES[page], "Origin": origins.get(origin, origin)}
    body = json.dumps({"model": "qwen", "owner": "page", "ttl": 60}).encode()
    before = running.state()

    answers = [
        await running.send(route.method, path_of(route), headers, body)
        for route in changing(running.app)
    ]

    assert len(answers) > 12
    assert [403] * len(answers) == [status for status, _ in answers]
    assert {"cross_origin_refused"} == {json.loads(b)["error"]["code"] for _, b in answers}
    assert before == running.state()
    assert 1 == caplog.text.count("event=cross_origin_refused")  # the others are counted


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl
        {"Origin": "own", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},  # the address bar, an extension
        {"Origin": "own"},  # plain HTTP to another machine
    ],
)
async def test_the_servers_own_pages_and_other_clients_still_work(
    make: Make, headers: dict[str, str]
) -> None:
    """Requests that report this origin, or none, still work."""
    running = await make()
    given = {name: running.origin if v == "own" else v for name, v in headers.items()}
    given["Content-Type"] = "application/json"

    status, _ = await running.send("POST", "/v1/models/switch", given, b'{"model": "qwen"}')

    assert (200, "qwen") == (status, running.app.coordinator.active)


async def test_pages_of_allowed_origins_work(make: Make) -> None:
    """Pages of `--allowed-origins` work, whatever the browser reports about the site."""
    running = await make(allowed_origins=["https://page.example"])
    headers = {**CROSS, "Origin": "https://page.example", "Content-Type": "application/json"}
    other = {**headers, "Origin": "https://page.example.evil"}
    body = b'{"model": "qwen"}'

    refused, _ = await running.send("POST", "/v1/models/switch", other, body)
    status, _ = await running.send("POST", "/v1/models/switch", headers, body)

    assert (403, 200) == (refused, status)


async def test_a_refusal_needs_no_key(make: Make) -> None:
    """A foreign page's request is refused before anything else in it is checked, even its key."""
    running = await make(Access(admin_keys=["admin"]))
    headers = {**CROSS, "Origin": running.elsewhere, "Authorization": "Bearer admin"}

    status, _ = await running.send("POST", "/v1/models/switch", headers, b'{"model": "qwen"}')

    assert (403, "llama") == (status, running.app.coordinator.active)


async def test_a_page_of_another_origin_may_read_as_far_as_cors_lets_it(make: Make) -> None:
    """In `manual`, where inference moves no model, CORS makes the browser withhold the answer."""
    running = await make()
    headers = {**CROSS, "Origin": running.elsewhere, "Content-Type": "application/json"}

    status, _ = await running.send("GET", "/v1/models", headers)
    chat, _ = await running.send("POST", "/v1/chat/completions", headers, b'{"model": "llama"}')

    assert (200, 200) == (status, chat)


IMAGE = {**CROSS, **NO_CORS, "Sec-Fetch-Dest": "image"}
BLIND = [
    ("GET", "/docs?model={model}", IMAGE, b""),
    ("GET", "/docs/?model={model}", IMAGE, b""),
    ("GET", "/load?model={model}", {**SAME_SITE, **NO_CORS}, b""),
    ("POST", "/v1/chat/completions?model={model}", {**CROSS, **NO_CORS, "Origin": "null"}, b""),
    (
        "POST",
        "/v1/audio/transcriptions",
        {**CROSS, **NAVIGATE, "Origin": "https://evil.example", "Content-Type": FORM},
        b"model={model}",
    ),
]
"""Requests that a browser sends for a page of another origin without a preflight."""


@pytest.mark.parametrize("model", ["qwen", "cold"])
@pytest.mark.parametrize("mode", ["manual", "auto"])
async def test_a_page_of_another_origin_moves_no_model(
    make: Make, mode: Literal["manual", "auto"], model: str
) -> None:
    """Neither an image nor a form of another origin loads, wakes or switches to a model."""
    running = await make(mode=mode)
    before = running.state()

    answers = [
        await running.send(
            method, path.format(model=model), headers, body.replace(b"{model}", model.encode())
        )
        for method, path, headers, body in BLIND
    ]

    assert before == running.state()
    if mode == "auto":
        assert [403] * len(BLIND) == [status for status, _ in answers]
        assert {"cross_origin_refused"} == {json.loads(b)["error"]["code"] for _, b in answers}


@pytest.mark.parametrize(
    "headers", [{}, {"Sec-Fetch-Site": "same-origin"}, {**CROSS, "Origin": "https://page.example"}]
)
async def test_in_auto_programs_own_pages_and_allowed_origins_switch(
    make: Make, headers: dict[str, str]
) -> None:
    """Programs, own pages and allowed origins switch in `auto`; pages of other origins cannot."""
    running = await make(mode="auto", allowed_origins=["https://page.example"])
    given = {**headers, "Content-Type": "application/json"}

    status, _ = await running.send("POST", "/v1/chat/completions", given, b'{"model": "qwen"}')

    assert (200, "qwen") == (status, running.app.coordinator.active)


def test_a_refusal_names_the_flag_with_its_value() -> None:
    """The flag in a refusal can be pasted into the command that starts the server."""
    assert CrossOriginRefused("http://a:3").message.endswith(
        """--allowed-origins '["http://a:3"]'"""
    )
    assert HostRefused("host.docker.internal:8000").message.endswith(
        "start it with --allowed-hosts host.docker.internal:8000"
    )


async def test_a_page_of_another_origin_gets_no_websocket(make: Make) -> None:
    """Pages of other origins get no WebSocket, whose messages CORS would not hide."""
    running = await make()
    path = "/v1/realtime?model=llama"

    refused = [
        await running.upgrade(path, {**CROSS, "Origin": running.elsewhere}),
        await running.upgrade(path, {"Origin": running.elsewhere}),
        await running.upgrade(path, {"Origin": "null"}),
    ]
    own = await running.upgrade(path, {"Origin": running.origin})
    program = await running.upgrade(path, {})

    assert [403] * 3 == refused
    assert own == program != 403


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "localhost.evil.example", "8.8.8.8", "x@evil", "127.1"],
)
async def test_a_foreign_name_is_refused_on_loopback_without_keys(make: Make, host: str) -> None:
    """A foreign host name, as of a page resolved to this machine, is refused on every route."""
    running = await make()
    host = host.format(port=running.port)
    before = running.state()

    requests = [(r.method, path_of(r)) for r in running.app.routes if r.method != WEBSOCKET]
    answers = [await running.send(method, path, None, b"{}", host) for method, path in requests]

    assert [403] * len(requests) == [status for status, _ in answers]
    assert {"host_refused"} == {json.loads(b)["error"]["code"] for _, b in answers if b}
    assert before == running.state()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:{port}",
        "app.localhost:{port}",
        "localhost.",
        "127.0.0.1:{port}",
        "127.8.8.8",
        "[::1]:{port}",
        "::1",
        "[::ffff:127.0.0.1]",
        "0.0.0.0:{port}",
        "{machine}:{port}",
        "{address}",
        "models.example:80",
        "second.example",
        None,
    ],
)
async def test_names_of_this_machine_are_answered(make: Make, host: str | None) -> None:
    """This machine's names, `--allowed-hosts`, and requests without a name are answered."""
    running = await make(hosts=("Models.example", "second.example:8000"))
    entries = [e for each in psutil.net_if_addrs().values() for e in each]
    address = next(e.address for e in entries if e.family == socket.AF_INET)
    machine = socket.gethostname()
    if host is not None:
        host = host.format(port=running.port, machine=machine, address=address)

    status, _ = await running.send("GET", "/v1/models", host=host)

    assert 200 == status


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("models.example", "models.example:8000"),
        ("http://models.example:8000", "models.example"),
        ("https://Models.example/v1", "models.example"),
        ("models.example.", "models.example"),
        ("[2001:db8::1]:8000", "[2001:db8::1]"),
        ("2001:db8::1", "[2001:DB8::1]"),
        ("http://192.0.2.7:80", "192.0.2.7"),
        ("my_host", "my_host"),
        ("köln.example", "xn--kln-sna.example"),
    ],
)
def test_an_allowed_host_may_be_written_in_many_ways(given: str, sent: str) -> None:
    """An allowed host may be a name, with or without a port, a URL, or an address."""
    cross_site = CrossSite.of([], [given], lambda: True)

    cross_site.check_host("GET", "/", Headers({"host": sent}))
    with pytest.raises(HostRefused):
        cross_site.check_host("GET", "/", Headers({"host": "other.example"}))


@pytest.mark.parametrize(
    ("access", "given"),
    [
        (Access(user_keys=["u"]), {}),
        (Access(admin_keys=["a"]), {}),
        (Access(), {"host": "0.0.0.0"}),
    ],
)
async def test_other_servers_answer_to_any_name(
    make: Make, access: Access, given: dict[str, Any]
) -> None:
    """Servers with keys, or reached from other machines, answer to any name."""
    running = await make(access, **given)

    status, _ = await running.send("GET", "/health", host="models.example")

    assert 200 == status


@pytest.mark.parametrize(
    ("origin", "host", "passes"),
    [
        ("http://a.example", "a.example", True),
        ("http://a.example", "a.example:80", True),
        ("https://a.example", "a.example", True),  # TLS ends at a proxy
        ("https://a.example:443", "a.example", True),
        ("http://A.example:8000", "a.EXAMPLE:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://a.example:8000", "a.example", False),
        ("http://a.example", "a.example:8000", False),
        ("http://a.example", "b.example", False),
        ("http://a.example", "", False),
        ("http://a.example:x", "a.example:x", False),
        ("null", "null", False),
        ("a.example", "a.example", False),
        ("", "", False),
    ],
)
def test_an_origin_is_compared_by_host_and_port(origin: str, host: str, passes: bool) -> None:
    """Without the browser's report, an origin is compared by host and port, not by scheme."""
    headers = Headers({"origin": origin, "host": host})
    if passes:
        CrossSite().check_origin("POST", "/x", headers)
    else:
        with pytest.raises(CrossOriginRefused):
            CrossSite().check_origin("POST", "/x", headers)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "same-origin, none"])
def test_what_the_browser_says_of_the_site_decides_alone(site: str) -> None:
    """The browser's report wins over a matching origin, which only other programs can forge."""
    headers = Headers({"sec-fetch-site": site, "origin": "http://a", "host": "a"})

    with pytest.raises(CrossOriginRefused):
        CrossSite().check_origin("POST", "/x", headers)


def test_every_origin_may_be_allowed() -> None:
    """A star allows all, as with vLLM; `null` is allowed by its name."""
    for origins, origin in (("*", "http://a"), ("*", "null"), ("null", "null")):
        headers = Headers({"sec-fetch-site": "cross-site", "origin": origin, "host": "b"})
        CrossSite.of([origins], (), lambda: True).check_origin("POST", "/x", headers)


@pytest.mark.parametrize("is_escaped", [False, True])
def test_a_refused_host_is_logged_without_its_control_characters(
    caplog: pytest.LogCaptureFixture, is_escaped: bool
) -> None:
    """A refused host is one log line, escaped once, even if a whole server does so again."""
    caplog.set_level(logging.WARNING)
    before = logging.getLogRecordFactory()
    if is_escaped:
        escape_records()
    with pytest.raises(HostRefused):
        CrossSite.of((), (), lambda: True).check_host("GET", "/", Headers({"host": "a\x1bb["}))
    logging.setLogRecordFactory(before)

    assert "event=host_refused method=GET path='/' host='a\\x1bb['" in caplog.text
