"""A whole server, its clients and a ledger, under virtual time: the subject of the invariants.

A `World` is one server on fake engines. Its methods are possible happenings, from a request to the
death of an engine. None of them waits; `turn`, `settle` and `let_pass` let things continue. Every
client records what a client of an HTTP server would see. An `Invariant` checks the ledger, the
server's events and the server itself.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from tests.helpers.support import CHAT, OPEN, settled
from tests.helpers.virtual import START_S, VirtualLoop
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.api.relay import ResponseTruncated
from vllm_hotswap.config.settings import DrainAction, LimitsConfig, RecoveryConfig, SwitchingConfig
from vllm_hotswap.events import Event, RequestEnded, ResidencyChanged, SwitchEnded
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import Lease, ModelSettings
from vllm_hotswap.states import Residency
from vllm_hotswap.testing.fake_answers import WORDS
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_settings import UNLIMITED, FakeSettings

ALIASES = ("llama", "qwen", "mistral")
MIB = 1 << 20

SETTINGS = FakeSettings(
    load_s=5, activate_s=1, token_s=1, sleep_s=1, wake_s=2, unload_s=1, levels=frozenset([1, 2])
)
"""Whole seconds, so that many things happen at exactly the same moment."""

RECOVERY = RecoveryConfig(
    max_restarts=3,
    hang_timeout=5,
    step_timeout=10,
    load_timeout=60,
    command_timeout=30,
    max_backoff=8,
)

Outcome = Literal["open", "answered", "failed", "left", "lost"]

C = TypeVar("C", bound="Call")
E = TypeVar("E", bound=Event)

LONG_S = 100_000.0
"""Longer than anything whose time a world's settings limit."""


@dataclass(frozen=True)
class Shape:
    """The parameters of a world."""

    models_that_fit: int = 3
    max_waiting: int = 1024
    max_parked: int = 1024
    wait_timeout: float = 20
    drain_timeout: float = 10
    parked_timeout: float = 40
    in_flight: int = 10_000
    burst: int = 2000
    client_timeout: float = 20
    is_watched: bool = False
    """Whether the host is probed for signs of life."""
    idles: bool = False
    """Whether an idle model is put to sleep."""
    slices: int = 0
    """Number of slices in which a sleeping model wakes, on a device with memory of its own."""
    policy: str | None = None
    """The policy of the mode `auto`; None: the mode is `manual`."""

    @property
    def settings(self) -> FakeSettings:
        return replace(SETTINGS, slices=self.slices, offloads=True) if self.slices else SETTINGS

    @property
    def budget(self) -> Usage:
        if self.models_that_fit >= len(ALIASES):
            return UNLIMITED
        return Usage(self.models_that_fit * 2 * MIB + MIB // 2, 4 * MIB)


@dataclass(eq=False)
class Call:
    """One HTTP request, and everything that its client sees of it."""

    path: str
    body: Mapping[str, Any]
    began_s: float
    loop: VirtualLoop
    method: str = "POST"
    task: asyncio.Task[None] = field(init=False)
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    answer: bytearray = field(default_factory=bytearray)
    complete: bool = False
    broken: bool = False
    """The server closed the connection before the answer was complete."""
    mistake: BaseException | None = None
    left: bool = False
    ended_s: float | None = None
    """When the server finished it."""
    surplus: int = 0
    """Number of messages that came after the end of the answer."""
    has_always_read: bool = True
    is_refused: bool = False
    """Whether the server wants to send an error, which may have to wait for the client to read."""
    blocked_s: float | None = None
    """Since when the server has waited for the client to read."""
    on_piece: Callable[[Call, bytes], None] | None = None
    """Called with every piece of the answer."""

    def __post_init__(self) -> None:
        self._name = f"<{self.path} {dict(self.body)} t={self.began_s - START_S:g}"
        self._asked = False
        self._over = asyncio.Event()
        self._reads = asyncio.Event()
        self._reads.set()

    def __repr__(self) -> str:
        how = "left" if self.left else "open" if self.is_open else self.status
        return f"{self._name} {how}>"

    # --- actions of the client ----------------------------------------------------------------

    def begin(self, app: Any) -> None:
        self.task = self.loop.create_task(self._run(app), name=repr(self))

    def stop_reading(self) -> None:
        if not self.left:
            self.has_always_read = False
            self._reads.clear()

    def go_on_reading(self) -> None:
        self._reads.set()

    def leave(self) -> None:
        if not self.complete:
            self.left = True
            self._over.set()
            self._reads.set()

    def walk_away(self) -> None:
        """Disconnect, so that the server's work on the call is cancelled."""
        self.left = True
        self.task.cancel()

    @property
    def is_reading(self) -> bool:
        return self._reads.is_set()

    async def _run(self, app: Any) -> None:
        path = self.path.encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": path,
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("client", 1),
            "server": ("server", 80),
        }
        try:
            await app(scope, self._receive, self._send)
        except ResponseTruncated:
            pass
        except Exception as error:  # noqa: BLE001  # invariants check every kind
            self.mistake = error
        finally:
            self.ended_s = self.loop.time()
            self.broken = not (self.complete or self.left)
            self._over.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            body = json.dumps(self.body).encode()
            return {"type": "http.request", "body": body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.blocked_s = self.loop.time()
        self.is_refused = self.is_refused or message.get("status", 0) >= 400
        await self._reads.wait()
        self.blocked_s = None
        if self.left:
            return  # as an HTTP server does: no error is raised
        self.surplus += self.complete
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            return
        self.complete = not message.get("more_body")
        if piece := message.get("body"):
            self.answer += piece
            if self.on_piece is not None:
                self.on_piece(self, piece)
        if self.complete:
            self._over.set()

    # --- results ------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self.ended_s is None

    @property
    def outcome(self) -> Outcome:
        if self.left:
            return "left"
        if self.is_open:
            return "open"
        if self.is_whole:
            return "answered"
        return "failed" if self.is_explicit_failure else "lost"

    @property
    def is_whole(self) -> bool:
        return self.complete and self.status == 200

    @property
    def is_explicit_failure(self) -> bool:
        """Whether no client can take this for an answer, and it has a reason or is cut mid-air."""
        return self.broken or self.code is not None

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.answer))

    @property
    def code(self) -> str | None:
        """The code of the error that was the answer, or that cut it."""
        if not self.complete or self.status is None:
            return None
        if self.status >= 400:
            return str(self.json["error"]["code"])
        return None


@dataclass(eq=False, repr=False)
class Ask(Call):
    """A request for words of a model."""

    admitted_s: float | None = None
    """When it was first found to hold a lease."""
    _parsed: int = 0
    _chunks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def alias(self) -> str | None:
        return self.body.get("model")

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The pieces of the answer, including the error that ends a stream."""
        if len(self.answer) > self._parsed:
            self._parsed, self._chunks = len(self.answer), list(self._parse())
        return self._chunks

    def _parse(self) -> Iterator[dict[str, Any]]:
        if self.is_streamed and self.status == 200:
            for event in bytes(self.answer).decode().split("\n\n"):
                if event.startswith("data: {"):
                    yield json.loads(event.removeprefix("data: "))
        elif self.complete and self.status == 200:
            yield self.json

    @property
    def text(self) -> str:
        """The words that have arrived."""
        choices = [chunk["choices"][0] for chunk in self.chunks if "choices" in chunk]
        key = "delta" if self.is_streamed else "message"
        return "".join(choice[key]["content"] for choice in choices).strip()

    @property
    def models(self) -> set[str]:
        """The models that the answer names."""
        return {chunk["model"] for chunk in self.chunks if "model" in chunk}

    @property
    def is_whole(self) -> bool:
        if not (self.complete and self.status == 200):
            return False
        if self.is_streamed and not self.answer.endswith(b"data: [DONE]\n\n"):
            return False
        return len(self.text.split(" ")) == len(words_of("", self.body["max_tokens"]).split(" "))

    @property
    def code(self) -> str | None:
        if self.is_streamed and self.status == 200 and self.complete:
            codes = [chunk["error"]["code"] for chunk in self.chunks if "error" in chunk]
            return codes[0] if codes and not self.answer.endswith(b"[DONE]\n\n") else None
        return super().code


@dataclass(eq=False, repr=False)
class SwitchCall(Call):
    """A request to the switch endpoint."""

    @property
    def target(self) -> str:
        return str(self.body["model"])

    ahead: int = 0
    """Number of calls that may have to be done first."""


def words_of(alias: str, count: int) -> str:
    """Return a model's answer as one text."""
    return " ".join(WORDS[n % len(WORDS)].format(alias=alias) for n in range(count))


class Host(FakeHost):
    """Records its commands, and how many of them run at once."""

    _underway = 0
    most_at_once = 0
    _slices = 0
    most_slices_at_once = 0
    slices_while_moving = 0
    """Slices of a wake that started while a model was moved."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.canaries: list[tuple[str, str]] = []
        """What each model generated when it was verified, in order."""
        self.held: set[tuple[str, str]] = set()
        self.told: list[tuple[str, str]] = []
        """Its commands, in order."""
        self.misstamped = False
        """Whether outputs ever had another model's stamp."""

    def hold(self, operation: str, alias: str) -> None:
        super().hold(operation, alias)
        self.held.add((operation, alias))

    def let_go(self) -> None:
        """Release all held operations."""
        for operation, alias in self.held:
            self.release(operation, alias)
        self.held.clear()

    @property
    def is_hung(self) -> bool:
        return not self._answers.is_set()

    def misstamp(self, alias: str) -> None:
        """Give an engine's outputs another model's stamp, until it is activated again."""
        engine = self.engines[alias]
        engine.steps.stamp = ("nobody", engine.steps.stamp[1])
        self.misstamped = True

    def repair(self) -> None:
        """Remove all faults."""
        self.let_go()
        self._gates.forget_failures()
        for engine in self.engines.values():
            known = [canary for alias, canary in self.canaries if alias == engine.alias]
            engine.missing_files, engine.canary = False, known[0] if known else "canary"
            engine.steps.stamp = (engine.alias, engine.steps.stamp[1])

    @property
    def is_busy(self) -> bool:
        return self._underway > 0

    async def operate(self, operation: str, alias: str, duration_s: float) -> None:
        self.told.append((operation, alias))
        if operation in ("wake_some", "give_up_wake"):
            await self._beside(operation, alias, duration_s)
            return
        if operation in ("prefetch", "add_adapter", "restart"):  # which move nothing
            await super().operate(operation, alias, duration_s)
            return
        self._underway += 1
        self.most_at_once = max(self.most_at_once, self._underway)
        try:
            await super().operate(operation, alias, duration_s)
            if operation == "verify":
                self.canaries.append((alias, self.engines[alias].canary))
        finally:
            self._underway -= 1

    async def _beside(self, operation: str, alias: str, duration_s: float) -> None:
        """Operations beside a served model; moves of other models need not wait for them."""
        self.slices_while_moving += operation == "wake_some" and self.is_busy
        self._slices += operation == "wake_some"
        self.most_slices_at_once = max(self.most_slices_at_once, self._slices)
        try:
            await super().operate(operation, alias, duration_s)
        finally:
            self._slices -= operation == "wake_some"


@dataclass
class Stay:
    """A period in which a model was active."""

    alias: str
    began_s: float
    epoch: int | None = None
    ended_s: float | None = None


class World:
    """A server, its clients, and everything that they and its observers have seen."""

    def __init__(self, shape: Shape, adapter_folders: Sequence[Path] = ()) -> None:
        self.shape = shape
        self.loop = VirtualLoop()
        self.asks: list[Ask] = []
        self.hangs = 0
        """How often the host was hung."""
        self.recent_asks: list[Ask] = []
        """Calls that are open, or were a moment ago."""
        self.stays: list[Stay] = []
        self.released: dict[asyncio.Task[Any] | None, list[RequestEnded]] = defaultdict(list)
        """What was reported at the end of each request, by its task."""
        self.switches: list[SwitchCall] = []
        self.operations: list[Call] = []
        self.events: list[tuple[float, Event]] = []
        self.invariants: list[Invariant] = []
        self.stopping: asyncio.Task[None] | None = None
        self.stop_timeout_s = 0.0
        self.stop_took_s = 0.0
        self.left_by_stop: list[Lease] = []
        self.host = Host(ALIASES, dict.fromkeys(ALIASES, shape.settings), shape.budget)
        switching = SwitchingConfig(
            max_waiting=shape.max_waiting,
            max_parked=shape.max_parked,
            wait_timeout=shape.wait_timeout,
            drain_timeout=shape.drain_timeout,
            parked_timeout=shape.parked_timeout,
            rate=0.1,
            burst=shape.burst,
            mode="auto" if shape.policy else "manual",
            policy=shape.policy or "batch",
            max_wait=7,
            slice=4,
        )
        self.app = HotswapApp(
            self.host,
            OPEN,
            switching,
            observers=(self,),
            model_settings={"mistral": ModelSettings(idle_sleep_s=30)} if shape.idles else None,
            adapter_folders=adapter_folders,
            clock=self.loop.time,
            limits=LimitsConfig(in_flight=shape.in_flight, client_timeout=shape.client_timeout),
            recovery=RECOVERY,
        )
        self.coordinator = self.app.coordinator
        self.registry = self.coordinator.registry
        self.loop.run(self._start())

    async def _start(self) -> None:
        await self.host.start()
        await self.coordinator.start(ALIASES[: min(2, self.shape.models_that_fit)], "llama")
        self.host.most_at_once = 0  # a start loads several models at the same time
        lasting = {
            "resting": self.coordinator.rest_idle_models(),
            "watching": self.coordinator.recovery.watch(),
            "evicting": self.app.router.disconnect_stalled_clients(),
        }
        if not self.shape.is_watched:
            lasting.pop("watching").close()
        self.background = [self.loop.create_task(c, name=name) for name, c in lasting.items()]

    def notify(self, event: Event) -> None:
        self._date_stays()
        self.events.append((self.now_s, event))
        match event:
            case ResidencyChanged(after=Residency.ACTIVE):
                self.stays.append(Stay(event.model, self.now_s))
            case ResidencyChanged(before=Residency.ACTIVE):
                self.stays[-1].ended_s = self.now_s
            case RequestEnded():
                self.released[asyncio.current_task()].append(event)
        for invariant in self.invariants:
            invariant.on_event(event)

    def watch(self, kinds: Iterable[type[Invariant]]) -> None:
        self.invariants = [kind(self) for kind in kinds]

    # --- the present state ------------------------------------------------------------------

    @property
    def has_failed_now(self) -> bool:
        """Whether a switch for which other requests waited has failed at this very moment."""
        return any(
            isinstance(event, SwitchEnded) and event.status == "failed"
            for at_s, event in self.events
            if at_s == self.now_s
        )

    @property
    def is_automatic(self) -> bool:
        """Whether the server switches automatically."""
        return self.coordinator.is_automatic

    @property
    def leases(self) -> dict[asyncio.Task[Any] | None, Lease]:
        """Leases by the task of their request."""
        return {lease.task: lease for model in self.registry for lease in model.leases}

    def all_of(self, kind: type[E]) -> list[E]:
        return [event for _, event in self.events if isinstance(event, kind)]

    def _date_stays(self) -> None:
        """Date the last stay: the epoch is raised just after a model is reported as active."""
        if self.stays and self.stays[-1].epoch is None:
            self.stays[-1].epoch = self.coordinator.epoch

    def active_between(self, began_s: float, ended_s: float) -> set[str]:
        """Return the models that were active at some time in this period."""
        return {
            stay.alias
            for stay in self.stays
            if stay.began_s <= ended_s and (stay.ended_s is None or stay.ended_s >= began_s)
        }

    def active_s(self, alias: str, since_s: float) -> float:
        """Return for how long the model has been active since then."""
        stays = [stay for stay in self.stays if stay.alias == alias]
        now_s = self.now_s
        times = [
            (now_s if s.ended_s is None else s.ended_s) - max(s.began_s, since_s) for s in stays
        ]
        return sum(max(0.0, time_s) for time_s in times)

    def alias_of(self, role: str) -> str | None:
        """Return the alias that a request of this role names: active, target, other or none."""
        active, target = self.coordinator.active, self.coordinator.serving().target
        match role:
            case "active":
                return active or "llama"
            case "target":
                return target or active or "llama"
            case "other":
                return next(alias for alias in ALIASES if alias not in (active, target))
        return None

    def drain_timeout_of(self, target: str) -> float:
        """Return the longest drain timeout of calls that may have started the present switch."""
        ended_s = [time_s for time_s, event in self.events if isinstance(event, SwitchEnded)]
        since_s = ended_s[-1] if ended_s else START_S
        calls = [
            call for call in self.switches if call.target == target and call.began_s >= since_s
        ]
        timeouts = [call.body.get("drain_timeout", self.shape.drain_timeout) for call in calls]
        return float(max(timeouts, default=0))  # recovery's own switch waits for no request

    # --- time -----------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return self.loop.time()

    def turn(self, turns: int) -> None:
        """Give every runnable task a few turns; no time passes."""

        async def give_way() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run(give_way())
        self._look()

    def settle(self) -> None:
        """Let everything run that needs no time."""
        self.loop.run(settled())
        self._look(is_settled=True)

    def let_pass(self, seconds: float) -> None:
        self.loop.run(asyncio.sleep(seconds))
        self._look()

    def _look(self, is_settled: bool = False) -> None:
        self._date_stays()
        leases = self.leases
        for ask in self.recent_asks:
            if ask.admitted_s is None and ask.task in leases:
                ask.admitted_s = self.now_s
        for invariant in self.invariants:
            invariant.at_any_time()
            if is_settled:
                invariant.when_settled()
            invariant.verify()
        self.recent_asks = [ask for ask in self.recent_asks if ask.is_open]

    # --- actions of clients ---------------------------------------------------------------------

    def ask(self, alias: str | None, words: int = 3, streamed: bool = True) -> Ask:
        body: dict[str, Any] = {"max_tokens": words}
        if alias is not None:
            body["model"] = alias
        if streamed:
            body["stream"] = True
        ask = Ask(CHAT, body, self.now_s, self.loop)
        self.asks.append(self._begin(ask))
        self.recent_asks.append(ask)
        return ask

    def switch(
        self, target: str, drain_timeout_s: float | None = None, policy: DrainAction | None = None
    ) -> SwitchCall:
        body: dict[str, Any] = {"model": target}
        if drain_timeout_s is not None:
            body["drain_timeout"] = drain_timeout_s
        if policy is not None:
            body["on_drain_timeout"] = policy
        call = SwitchCall("/v1/models/switch", body, self.now_s, self.loop)
        call.ahead = sum(other.is_open for other in (*self.switches, *self.operations))
        self.switches.append(self._begin(call))
        return call

    def operate(self, alias: str, what: str, /, method: str = "POST", **body: Any) -> Call:
        call = Call(f"/admin/models/{alias}/{what}", body, self.now_s, self.loop, method)
        self.operations.append(self._begin(call))
        return call

    def announce(self, alias: str) -> Call:
        call = Call("/admin/next", {"model": alias}, self.now_s, self.loop)
        self.operations.append(self._begin(call))
        return call

    def get(self, path: str) -> Call:
        """Return the answer to a request that the server answers at once."""
        call = Call(path, {}, self.now_s, self.loop, "GET")
        call.begin(self.app)
        self.loop.run(settled())
        assert not call.is_open
        return call

    def _begin(self, call: C) -> C:
        call.on_piece = self._piece
        call.begin(self.app)
        return call

    def _piece(self, call: Call, piece: bytes) -> None:
        self._date_stays()
        for invariant in self.invariants:
            invariant.on_piece(call, piece)

    @property
    def calls(self) -> list[Call]:
        return [*self.asks, *self.switches, *self.operations]

    @property
    def open_asks(self) -> list[Ask]:
        return [ask for ask in self.asks if ask.is_open]

    @property
    def stopped_readers(self) -> list[Ask]:
        return [ask for ask in self.open_asks if not ask.is_reading]

    @property
    def open_switches(self) -> list[SwitchCall]:
        return [call for call in self.switches if call.is_open]

    # --- failures -------------------------------------------------------------------------------

    def befall(self, happening: Callable[[], None]) -> None:
        """Apply an event to the host."""

        async def happen() -> None:
            happening()

        self.loop.run(happen())

    @property
    def can_hang(self) -> bool:
        return self.shape.is_watched and not self.host.died.done()

    def hang(self) -> None:
        """Hang the host; the server has to notice."""
        self.hangs += 1
        self.host.hang()

    def hold(self, operation: str, alias: str) -> None:
        """Make the host never finish its next command."""
        self.hangs += 1
        self.host.hold(operation, alias)

    @property
    def is_given_up(self) -> bool:
        return self.coordinator.given_up.done()

    # --- the end --------------------------------------------------------------------------------

    def shut_down(self, timeout_s: float) -> None:
        """Start to stop the server."""
        if self.stopping is None:
            self.stop_timeout_s = timeout_s
            self.stopping = self.loop.create_task(self._stop(timeout_s), name="shut_down")

    async def _stop(self, timeout_s: float) -> None:
        began_s = self.now_s
        await self.coordinator.shut_down(timeout_s)
        self.left_by_stop = list(self.leases.values())
        self.stop_took_s = self.now_s - began_s

    def finish(self) -> None:
        """Remove all faults, and wait for the end of everything."""
        self.host.repair()
        for model in self.registry:
            self.coordinator.ladder.pin(model, pinned=False)
        for call in self.calls:
            call.go_on_reading()
        self.loop.run(self._all_over())
        self.let_pass(60)  # timers of grace times
        for invariant in self.invariants:
            invariant.at_end()
            invariant.verify()

    async def _all_over(self) -> None:
        tasks = [call.task for call in self.calls]
        if self.stopping is not None:
            tasks.append(self.stopping)
        if tasks:
            await asyncio.wait(tasks, timeout=LONG_S)

    def close(self) -> None:
        while tasks := asyncio.all_tasks(self.loop):  # one that ends may start another, to recover
            for task in tasks:
                task.cancel()
            self.loop.run(self._gather(tasks))
        self.loop.run(self.loop.shutdown_asyncgens())
        self.loop.close()

    async def _gather(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LONG_S)


class Invariant:
    """A condition that holds at any time. It inspects a whole world, and changes nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._broken: list[str] = []

    def on_event(self, event: Event) -> None:
        """Called at an event, in the middle of the code that emits it."""

    def on_piece(self, call: Call, piece: bytes) -> None:
        """Called when a client has got a piece of its answer."""

    def at_any_time(self) -> None:
        """Called after some turns of the loop."""

    def when_settled(self) -> None:
        """Called when nothing can continue without time."""

    def at_end(self) -> None:
        """Called when everything has had time to end."""

    def expect(self, holds: object, otherwise: str) -> None:
        """Record a breach, which makes the next `verify` fail, but not the server's own code."""
        if not holds:
            self._broken.append(f"t={self.world.now_s - START_S:g}: {otherwise}")

    def verify(self) -> None:
        assert not self._broken, "\n".join(self._broken)
