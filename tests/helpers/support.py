"""A whole server on fake engines, in this process, and clients whose reading a test controls.

Tests wait with `settled`: it returns when nothing can continue by itself.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx

from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.config.settings import (
    IsolationConfig,
    LimitsConfig,
    RecoveryConfig,
    SwitchingConfig,
)
from vllm_hotswap.events import Event
from vllm_hotswap.models.engine import Engine
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import Lease, Model, ModelSettings
from vllm_hotswap.scheduling.scheduler import DEFAULT_TERMS, RequestTerms
from vllm_hotswap.states import RequestStep
from vllm_hotswap.switching.auto import AutoAdmission
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_settings import UNLIMITED, FakeSettings

CHAT = "/v1/chat/completions"
OPEN = Access(dev_mode=True)


async def settled() -> None:
    """Wait until nothing can continue by itself."""
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(0)
    while loop._ready:  # noqa: ASYNC110  # other tasks get turns; no time is waited for
        await asyncio.sleep(0)


def lease(alias: str = "llama", epoch: int = 1, **fields: Any) -> Lease:
    """Make the lease of an admitted request; its model has no engine."""
    model = Model(alias, cast("Engine", None))
    made = Lease(model, epoch, **{"task": None, **fields})
    made.step(RequestStep.ADMIT)
    return made


class Recorder:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def notify(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@dataclass
class Answer:
    """A client's response. `complete` is false if the server stopped before the end."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.body)["error"])

    @property
    def events(self) -> list[str]:
        return [event for event in self.body.decode().split("\n\n") if event]

    @property
    def is_whole(self) -> bool:
        return self.events[-1] == "data: [DONE]"


@dataclass
class Stream:
    """A client that reads one event at a time; the server is at most one event ahead."""

    app: Any
    scope: dict[str, Any]
    task: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._from_app: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._credit = asyncio.Semaphore(0)
        self._answer = Answer(0, {}, b"", complete=False)

    def begin(self, *parts: bytes) -> Stream:
        for number, part in enumerate(parts, 1):
            self.say({"type": "http.request", "body": part, "more_body": number < len(parts)})
        self.task = asyncio.create_task(self._run())
        return self

    def say(self, message: dict[str, Any]) -> None:
        self._to_app.put_nowait(message)

    async def next_event(self) -> str | None:
        """Return the next piece of the body, None after the last one."""
        while (message := await self._from_app.get()) is not None:
            self._credit.release()
            if message["type"] == "http.response.start":
                self._begin_answer(message)
            elif body := message.get("body"):
                self._answer.body += body
                return str(body.decode())
        return None

    async def finish(self) -> Answer:
        """Read to the end."""
        while await self.next_event() is not None:
            pass
        return self._answer

    def disconnect(self) -> None:
        """Disconnect. Whatever the server sends from now on is lost."""
        self.say({"type": "http.disconnect"})
        for _ in range(1000):
            self._credit.release()

    def _begin_answer(self, message: dict[str, Any]) -> None:
        self._answer.status = message["status"]
        self._answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}

    async def _run(self) -> None:
        try:
            await self.app(self.scope, self._to_app.get, self._send)
        finally:
            self._from_app.put_nowait(None)

    async def _send(self, message: dict[str, Any]) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body")
        self._answer.complete = self._answer.complete or is_last
        self._from_app.put_nowait(message)
        if not is_last:
            await self._credit.acquire()


@dataclass
class Websocket:
    """A client that requests a WebSocket. `received` has the messages that it gets."""

    app: Any
    scope: dict[str, Any]
    task: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.received: list[dict[str, Any]] = []
        self.task = asyncio.create_task(self.app(self.scope, self._to_app.get, self._receive))
        self._say({"type": "websocket.connect"})

    def send(self, text: str) -> None:
        self._say({"type": "websocket.receive", "text": text})

    def leave(self) -> None:
        self._say({"type": "websocket.disconnect", "code": 1001})

    @property
    def types(self) -> list[str]:
        return [message["type"].removeprefix("websocket.") for message in self.received]

    @property
    def texts(self) -> list[Any]:
        sent = [message for message in self.received if message["type"] == "websocket.send"]
        return [json.loads(message["text"]) for message in sent]

    @property
    def denial(self) -> tuple[int, dict[str, Any]]:
        """Return status and error of a WebSocket that was refused with an HTTP answer."""
        start, body = self.received
        return start["status"], json.loads(body["body"])["error"]

    def _say(self, message: dict[str, Any]) -> None:
        self._to_app.put_nowait(message)

    async def _receive(self, message: dict[str, Any]) -> None:
        self.received.append(message)


class Server:
    """`HotswapApp` on a `FakeHost`; models that are not in `load` stay cold."""

    def __init__(
        self,
        *,
        load: tuple[str, ...] = ("llama", "qwen"),
        default: str = "llama",
        access: Access = OPEN,
        aliases: tuple[str, ...] = ("llama", "qwen", "mistral"),
        settings: Mapping[str, FakeSettings] | None = None,
        budget: Usage = UNLIMITED,
        model_settings: Mapping[str, ModelSettings] | None = None,
        further: Mapping[str, tuple[str, ...]] | None = None,
        adapter_folders: Sequence[Path] = (),
        clock: Callable[[], float] = time.monotonic,
        limits: LimitsConfig | None = None,
        recovery: RecoveryConfig | None = None,
        isolation: IsolationConfig | None = None,
        **switching: Any,
    ) -> None:
        self._load, self._default = load, default
        self.host = FakeHost(aliases, settings, budget, further)
        self.events = Recorder()
        self.app = HotswapApp(
            self.host,
            access,
            SwitchingConfig(**switching),
            observers=(self.events,),
            model_settings=model_settings,
            adapter_folders=adapter_folders,
            clock=clock,
            limits=limits,
            recovery=recovery,
            isolation=isolation,
        )
        self.coordinator = self.app.coordinator
        self.answered: list[str] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://server"
        )

    def lease(
        self, name: str | None, terms: RequestTerms = DEFAULT_TERMS
    ) -> AbstractAsyncContextManager[Lease]:
        """Hold the model that a request with this name is for, as the router does."""
        model = self.coordinator.resolve_target(name)
        return self.coordinator.lease(model, name, terms)

    @property
    def auto(self) -> AutoAdmission:
        """How requests are admitted in the mode `auto`."""
        assert isinstance(self.coordinator.admission, AutoAdmission)
        return self.coordinator.admission

    async def start(self) -> Server:
        await self.host.start()
        await self.coordinator.start(self._load, self._default)
        self.host.operations.clear()
        return self

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.coordinator.shut_down(0)
        await self._client.aclose()
        await self.host.stop()

    # --- actions of clients -------------------------------------------------------------

    async def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return await self._client.get(path, **kwargs)

    async def post(self, path: str, **kwargs: Any) -> httpx.Response:
        return await self._client.post(path, **kwargs)

    async def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return await self._client.request(method, path, **kwargs)

    def ask(
        self, alias: str | None, *, name: str = "", path: str = CHAT, **body: Any
    ) -> asyncio.Task[httpx.Response]:
        """Start a request that is answered in one piece."""
        content = body if alias is None else {"model": alias, **body}
        task = self._keep(self.post(path, json=content))
        task.add_done_callback(lambda _: self.answered.append(name))
        return task

    def switch(
        self, alias: str, drain_timeout: float | None = None
    ) -> asyncio.Task[httpx.Response]:
        """Start a call to the switch endpoint."""
        body = {"model": alias}
        if drain_timeout is not None:
            body["drain_timeout"] = drain_timeout
        return self._keep(self.post("/v1/models/switch", json=body))

    def operate(self, alias: str, name: str, **body: Any) -> asyncio.Task[httpx.Response]:
        """Start a call to one of the operations on a model."""
        return self._keep(self.post(f"/admin/models/{alias}/{name}", json=body))

    def stream(self, alias: str | None, *, path: str = CHAT, words: int = 3) -> Stream:
        """Start a request that is answered as a stream, without waiting for anything."""
        body: dict[str, Any] = {"stream": True, "max_tokens": words}
        if alias is not None:
            body["model"] = alias
        return self.request("POST", path, json.dumps(body).encode())

    def request(self, method: str, path: str, *parts: bytes, **scope: Any) -> Stream:
        """Start any request, its body in parts."""
        stream = Stream(
            self.app,
            {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": "2.3"},
                "http_version": "1.1",
                "scheme": "http",
                "method": method,
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "root_path": "",
                "headers": [(b"content-type", b"application/json")] if any(parts) else [],
                "client": ("client", 1),
                "server": ("server", 80),
                **scope,
            },
        ).begin(*parts)
        self._tasks.append(stream.task)
        return stream

    def websocket(self, path: str, query: str = "", can_deny: bool = True) -> Websocket:
        """Request a WebSocket from a server that can, or cannot, refuse one with HTTP."""
        connection = Websocket(
            self.app,
            {
                "type": "websocket",
                "path": path,
                "query_string": query.encode(),
                "headers": [],
                "subprotocols": [],
                "extensions": {"websocket.http.response": {}} if can_deny else {},
            },
        )
        self._tasks.append(connection.task)
        return connection

    async def start_stream(self, alias: str | None, **kwargs: Any) -> Stream:
        """Start a stream and read its first event."""
        stream = self.stream(alias, **kwargs)
        await stream.next_event()
        return stream

    # --- what tests inspect -------------------------------------------------------------

    async def settled(self) -> None:
        await settled()

    @property
    def in_flight(self) -> dict[str, int]:
        return {model.alias: len(model.leases) for model in self.coordinator.registry}

    def residency(self, alias: str) -> str:
        return self.coordinator.registry.resolve(alias).residency.value

    @property
    def residencies(self) -> dict[str, str]:
        return {model.alias: model.residency.value for model in self.coordinator.registry}

    def _keep(self, call: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(call)
        self._tasks.append(task)
        return task
