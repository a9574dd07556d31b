"""The configured models and what the server knows of each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm_hotswap.engines.base import Engine
from vllm_hotswap.errors import (
    AdapterUnavailable,
    ClientStalled,
    DrainCut,
    EngineUnavailable,
    GrammarTimeout,
    GrammarTooCostly,
    InvalidRequest,
    ParkedEnded,
    QueueFull,
    RateLimited,
    ResponseEnded,
    SwitchFailed,
    SwitchNotAllowed,
    UnknownModel,
    WaitTimeout,
    WrongStamp,
)
from vllm_hotswap.events import RequestResult
from vllm_hotswap.helpers import Bounds
from vllm_hotswap.planner import Usage
from vllm_hotswap.scheduler import NO_WISH, RequestTerms, Ticket
from vllm_hotswap.states import Residency, Step, WakeProgress, advance

Cut = (
    DrainCut
    | EngineUnavailable
    | ResponseEnded
    | ParkedEnded
    | ClientStalled
    | WrongStamp
    | SwitchFailed
    | QueueFull
    | RateLimited
    | WaitTimeout
    | GrammarTimeout
    | GrammarTooCostly
    | SwitchNotAllowed
)


class Countdown:
    """Calls back once a time is over, which does not go on while its request is parked."""

    def __init__(self, seconds: float, ring: Callable[[], object]) -> None:
        self._left_s = seconds
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None

    def go_on(self) -> None:
        """Idempotent."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._left_s, self._ring)

    def stop(self) -> None:
        """Until it goes on, with the time that is left. Idempotent."""
        if self._timer is not None:
            self._left_s = self._timer.when() - asyncio.get_running_loop().time()
            self._timer.cancel()
            self._timer = None


@dataclass(eq=False, slots=True)
class Lease:
    """One request's hold on its model, from admission to the last byte of its answer.

    A lease that is ended says why in `cut`, and calls `on_cut`, which whoever answers sets. Where
    the request has begun work that outlives its answer, the lease does, too, and ends it.

    A parked lease's request is frozen with its engine. When its model is active again, its `epoch`
    is that of the new activation; outputs of all epochs from `first_epoch` on are its own.
    """

    alias: str
    epoch: int
    task: asyncio.Task[object] | None
    cut: Cut | None = None
    on_cut: Callable[[], object] | None = None
    work: asyncio.Task[object] | None = None
    client_left: bool = False
    status: int = 200
    """Of the answer, once that has begun."""
    is_answered: bool = False
    """Whether the last byte of the answer has been sent, or set aside to be sent in its turn."""
    is_over: bool = False
    """Whether nobody works on it any more."""
    was_cut: bool = False
    """Whether there was something left that is missing now."""
    name: str | None = None
    """What the request calls its model: an alias, an adapter, or nothing."""
    is_parked: bool = False
    on_park: Callable[[], object] | None = None
    gate: asyncio.Future[None] | None = None
    """Nothing of the answer is sent before it is done: the engine has not been verified yet."""
    requests: set[str] = field(default_factory=set)
    """What its engine works on for it, by the ids that the engine gave."""
    deadline: asyncio.TimerHandle | None = None
    """When a parked request is ended."""
    countdowns: dict[str, Countdown] = field(default_factory=dict)
    """Of those of `requests` whose first output is waited for."""
    ask: Callable[[int], Awaitable[None]] | None = None
    """Called, with the tokens that it asks for, before its engine is given anything of it: in the
    mode `auto` it waits there for its turn. None: it has had its turn."""
    terms: RequestTerms = NO_WISH
    """What counts of what the request asks for."""
    ticket: Ticket | None = None
    """Its place among those that wait, in the mode `auto`."""
    calls: int = 1
    """Requests that its engine is asked for by it."""
    cache_salt: str = ""
    """What sets its prompts apart from those of others in its engine's prefix cache."""
    account: str = ""
    """With whom it shares its turns at its engine, and where grammars are checked and compiled."""
    engine_share: float = 1.0
    """Of its engine's places, for its account, while others use it, too; 1: it never waits."""
    held_back: int = 0
    """Of `requests`, those that wait before its engine because of that."""
    grammar_timeout_s: float | None = None
    """In which its first output must come once its engine has it, if it has a grammar."""
    grammar_bounds: Bounds = field(default_factory=Bounds)
    """What it may take to try its grammar."""
    is_connection: bool = False
    """Whether it is a WebSocket, which may be open for long and ask for its engine now and then."""
    kept_waiting_s: Callable[[], float] | None = None
    """Says for how long, so far, its answer has waited for its client to take something in."""
    on_wait: Callable[[], object] | None = None
    on_admit: Callable[[], object] | None = None
    arrived_s: float = 0.0
    prepared_s: float = 0.0
    """Seconds from its arrival until it asked for its turn: it was looked at meanwhile."""
    admitted_s: float | None = None
    """When it had its turn; None: it has not had it yet."""
    switched: int = 0
    """Activations that it waited for."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_epoch = self.epoch

    @property
    def result(self) -> RequestResult:
        """How the request ended, for whoever counts."""
        if self.was_cut:
            return "cut"
        if self.client_left:
            return "left"
        if self.status < 400:
            return "served"
        return "refused" if self.status < 500 else "failed"

    @property
    def waited_s(self) -> float:
        """Seconds from its arrival to its turn."""
        return 0.0 if self.admitted_s is None else self.admitted_s - self.arrived_s

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of it goes on before its model is active."""
        return self.is_parked or self.admitted_s is None

    def admit(self, epoch: int, now_s: float) -> None:
        """It is its turn."""
        self.switched = epoch - self.epoch
        self.epoch = self.first_epoch = epoch
        self.admitted_s, self.ask = now_s, None
        if self.on_admit is not None:
            self.on_admit()

    def owns(self, alias: str, epoch: int) -> bool:
        """Whether an output with this stamp may be the request's."""
        return alias == self.alias and self.first_epoch <= epoch <= self.epoch

    @property
    def is_open(self) -> bool:
        """Whether there is something to end: an answer, or work that outlives it."""
        is_at_work = self.work is not None and not self.work.done()
        return self.cut is None and (is_at_work or not self.is_answered)

    def end(self, cause: Cut) -> None:
        """End the request, and whatever goes on after its answer. Only the first cause counts."""
        if self.cut is None:
            self.was_cut = self.is_open
            self.cut = cause
            if self.work is not None:
                self.work.cancel()
            self.settle()
            if self.on_cut is not None:
                self.on_cut()

    def kill(self) -> None:
        """Cancel the task of a request that was ended and goes on all the same."""
        if self.task is not None:
            self.task.cancel()

    def park(self, timeout_s: float, expire: Callable[[], object]) -> None:
        """Freeze the request; call `expire` unless it goes on within `timeout_s`."""
        self.is_parked = True
        self.deadline = asyncio.get_running_loop().call_later(timeout_s, expire)
        for countdown in self.countdowns.values():
            countdown.stop()
        if self.on_park is not None:
            self.on_park()

    def count_down(self, request_id: str, seconds: float, ring: Callable[[], object]) -> None:
        """Call `ring` in so many seconds, without those in which the request is parked."""
        self.countdowns[request_id] = countdown = Countdown(seconds, ring)
        if not self.is_parked:
            countdown.go_on()

    def stop_countdown(self, request_id: str) -> None:
        """Idempotent."""
        if (countdown := self.countdowns.pop(request_id, None)) is not None:
            countdown.stop()

    def await_verdict(self, epoch: int) -> None:
        """Its engine is stepped again, in `epoch`, but nothing is told before it is verified."""
        self.epoch = epoch
        self.shut()

    def shut(self) -> None:
        """Tell nothing more until the request is settled."""
        if self.gate is None:
            self.gate = asyncio.get_running_loop().create_future()

    def open(self) -> None:
        """Tell again: undo `shut`."""
        if self.gate is not None:
            if not self.gate.done():
                self.gate.set_result(None)
            self.gate = None

    def settle(self) -> None:
        """Go on, or end: no longer parked, and whatever there is to tell is told."""
        self.is_parked = False
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        if self.cut is None:
            for countdown in self.countdowns.values():
                countdown.go_on()
        self.open()


current_lease: ContextVar[Lease | None] = ContextVar("current_lease", default=None)
"""The lease of the request that the running task works on."""


@dataclass(frozen=True, slots=True)
class ModelPolicy:
    """What the configuration says of one model's residency, and of how it takes its turn.

    Times are in seconds, None for never.
    """

    pinned: bool = False
    idle_sleep_s: float | None = None
    idle_unload_s: float | None = None
    priority: int = 0
    max_wait_s: float | None = None
    """None: the server's."""
    weight: float = 1.0


@dataclass(eq=False, slots=True)
class Prefetch:
    """A cold model's files that are being read into memory, or have been."""

    limit_bytes: int
    """What may be read at most."""
    read_bytes: int = 0
    """What has been read so far."""
    is_called_for: bool = False
    """Whether somebody wants just this, whatever is expected to be next."""
    task: asyncio.Task[int] = field(init=False)

    @property
    def is_under_way(self) -> bool:
        return not self.task.done()

    @property
    def held_bytes(self) -> int:
        """What it takes of the host budget."""
        return self.limit_bytes if self.is_under_way else self.read_bytes

    def tell(self, read_bytes: int) -> None:
        """Take note of how far it has come; on whatever thread reads."""
        self.read_bytes = read_bytes


@dataclass(eq=False, slots=True)
class Waking:
    """A sleeping model whose memory is taken again, in slices, before it is asked for."""

    needs: Usage
    """What it will hold besides what it holds asleep. It counts from the beginning."""
    progress: WakeProgress | None = None
    """As it was last told."""
    given_up: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether what has been taken is to be given back."""
    task: asyncio.Task[None] = field(init=False)
    """Goes on until the model is awake, or has given everything back."""

    @property
    def is_given_up(self) -> bool:
        return self.given_up.is_set()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be taken."""
        return self.progress is not None and self.progress.is_done

    @property
    def done_bytes(self) -> int:
        return self.progress.done_bytes if self.progress else 0

    @property
    def total_bytes(self) -> int:
        return self.progress.total_bytes if self.progress else self.needs.device

    @property
    def left(self) -> float:
        """What part of it is still to be done, from 1 to 0."""
        return 1 - self.done_bytes / self.total_bytes if self.total_bytes else 1.0


@dataclass(eq=False, slots=True)
class Model:
    """One configured model. Its residency changes through `step` alone."""

    alias: str
    engine: Engine
    residency: Residency = Residency.COLD
    leases: dict[Lease, None] = field(default_factory=dict)
    """Of its requests, in the order in which they were admitted."""
    entered: dict[Lease, None] = field(default_factory=dict)
    """Of requests that its frontend looks at, or that wait for their turn, in the mode `auto`."""
    further: int = 0
    """Engine requests of its requests, beyond one for each."""
    emptied: asyncio.Future[None] | None = None
    """Whoever drains the model waits here for its last lease."""
    last_used_s: float | None = None
    failure: str | None = None
    policy: ModelPolicy = field(default_factory=ModelPolicy)
    pinned: bool = False
    is_verified: bool = False
    """Whether it has generated what it should since it was loaded or woken."""
    up_s: dict[Residency, float] = field(default_factory=dict)
    """Measured seconds that it took to bring it up from there."""
    prefetch: Prefetch | None = None
    """Of its files, until it is loaded, woken, or somebody does not want it any more."""
    waking: Waking | None = None
    """While it is asleep, and wakes before it is asked for."""

    def __repr__(self) -> str:
        return f"<Model {self.alias} {self.residency.value} in_flight={len(self.leases)}>"

    def step(self, step: Step) -> Residency:
        """Move on the residency ladder; returns where it was."""
        before, self.residency = self.residency, advance(self.alias, self.residency, step)
        return before

    @property
    def resting(self) -> Usage:
        """What it holds where it is."""
        return self.engine.footprint.at(self.residency)

    @property
    def held(self) -> Usage:
        """The same, and what it takes to wake before it is asked for."""
        return self.resting + (self.waking.needs if self.waking else Usage())

    @property
    def is_loaded(self) -> bool:
        """Whether it can be activated as it is."""
        return self.residency in (Residency.PARKED, Residency.ACTIVE)

    @property
    def parked(self) -> list[Lease]:
        """Requests that are frozen with its engine."""
        return [lease for lease in self.leases if lease.is_parked]

    @property
    def in_flight(self) -> int:
        """Engine requests of those that hold a lease, and of those that will."""
        return len(self.leases) + len(self.entered) + self.further

    def in_flight_as(self, name: str) -> int:
        """Requests that hold a lease, or will, and call the model by this name."""
        return sum(lease.name == name for lease in (*self.leases, *self.entered))


class Registry:
    """The models by alias, in the order of the configuration, and who else's names are theirs.

    Aliases, further names and adapters of all models are one set of names.
    """

    def __init__(
        self, engines: Mapping[str, Engine], policies: Mapping[str, ModelPolicy] | None = None
    ) -> None:
        policies = policies or {}
        self._models = {
            alias: _model(alias, engine, policies.get(alias, ModelPolicy()))
            for alias, engine in engines.items()
        }
        self._further = {
            name: model for model in self._models.values() for name in model.engine.aliases
        }

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def aliases(self) -> list[str]:
        return list(self._models)

    @property
    def names(self) -> list[str]:
        """Every name that a request may ask for."""
        adapters = [name for model in self for name in model.engine.adapters]
        return [*self._models, *self._further, *adapters]

    def resolve(self, name: str) -> Model:
        """The model that a request for this name goes to; that of an adapter is its base model.

        Raises:
            UnknownModel: nothing has that name.
            AdapterUnavailable: it is an adapter that could not be loaded.
        """
        model = self.owner(name)
        adapter = model.engine.adapters.get(name)
        if adapter is not None and adapter.failure is not None:
            raise AdapterUnavailable(model.alias, adapter.failure)
        return model

    def owner(self, name: str) -> Model:
        """The model whose alias, further name or adapter this is. Raises `UnknownModel`."""
        model = self._models.get(name) or self._further.get(name)
        if model is None:
            model = next((model for model in self if name in model.engine.adapters), None)
        if model is None:
            raise UnknownModel(name, self.names)
        return model

    def model(self, alias: str) -> Model:
        """The model of that alias or further name.

        Raises:
            UnknownModel: nothing has that name.
            InvalidRequest: it is an adapter; what happens to its model is not for it alone.
        """
        model = self.owner(alias)
        if alias in model.engine.adapters:
            raise InvalidRequest(
                f"{alias!r} is an adapter of model {model.alias!r}; name the model", "model"
            )
        return model


def _model(alias: str, engine: Engine, policy: ModelPolicy) -> Model:
    return Model(alias, engine, policy=policy, pinned=policy.pinned)
