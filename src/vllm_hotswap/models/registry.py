"""The configured models, and what the server knows about each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

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
from vllm_hotswap.models.engine import Engine
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.scheduling import DEFAULT_TERMS, Average, RequestTerms, Ticket
from vllm_hotswap.states import (
    RequestState,
    RequestStep,
    Residency,
    Step,
    WakeProgress,
    advance,
    advance_request,
)
from vllm_hotswap.system import Bounds

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
    """Calls back after a time; the clock stops while the request is parked."""

    def __init__(self, seconds: float, ring: Callable[[], object]) -> None:
        self._left_s = seconds
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start, or continue. Idempotent."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._left_s, self._ring)

    def stop(self) -> None:
        """Stop until `start`, which continues with the time that is left. Idempotent."""
        if self._timer is not None:
            self._left_s = self._timer.when() - asyncio.get_running_loop().time()
            self._timer.cancel()
            self._timer = None


@dataclass(eq=False, slots=True)
class Lease:
    """One request's hold on its model, from admission to the last byte of its answer.

    A lease that is ended has the cause in `cut`, and calls `on_cut`, which the code that answers
    sets. If the request has started work that outlives its response, the lease outlives the
    response, too, and ends that work.

    A parked lease's request is frozen with its engine. When its model is active again, its `epoch`
    is that of the new activation; outputs of all epochs from `first_epoch` on are its own.
    """

    model: Model
    epoch: int
    task: asyncio.Task[object] | None
    cut: Cut | None = None
    on_cut: Callable[[], object] | None = None
    work: asyncio.Task[object] | None = None
    client_left: bool = False
    status: int = 200
    """The response's, once that has started."""
    is_answered: bool = False
    """Whether the last byte of the response was sent, or is set aside with a refusal."""
    was_cut: bool = False
    """Whether it was still open when it was cut, so that something is missing now."""
    name: str | None = None
    """The model name in the request: an alias, an adapter, or None."""
    state: RequestState = RequestState.ENTERED
    """Changes only through `step`."""
    on_park: Callable[[], object] | None = None
    gate: asyncio.Future[None] | None = None
    """Holds back the response until it is done: the engine has not been verified yet."""
    requests: set[str] = field(default_factory=set)
    """Ids, given by its engine, of the engine requests that it works on for this lease."""
    deadline: asyncio.TimerHandle | None = None
    """Timer that ends a parked request."""
    countdowns: dict[str, Countdown] = field(default_factory=dict)
    """By request id, for those of `requests` whose first output is still to come."""
    wait_for_turn: Callable[[int], Awaitable[None]] | None = None
    """Called, with the number of tokens it needs, before its engine gets anything of it: in the
    mode `auto` it waits there for its turn. None: it has had its turn."""
    terms: RequestTerms = DEFAULT_TERMS
    """What the request asks for, limited by its rights."""
    ticket: Ticket | None = None
    """Its place in the queue, in the mode `auto`."""
    calls: int = 1
    """Engine requests that it may become."""
    cache_salt: str = ""
    """Separates its prompts from those of other callers in its engine's prefix cache."""
    account: str = ""
    """With which it shares turns at the engine, and in checking and compiling grammars."""
    engine_share: float = 1.0
    """Its account's part of the engine's places while others use it, too; 1: it never waits."""
    held_back: int = 0
    """How many of `requests` wait in front of the engine because of that."""
    grammar_timeout_s: float | None = None
    """Seconds in which its first output must come once its engine has it, if it has a grammar."""
    grammar_bounds: Bounds = field(default_factory=Bounds)
    """What trying its grammar may take."""
    is_connection: bool = False
    """Whether it is a WebSocket, which may stay open for long and need its engine now and then."""
    kept_waiting_s: Callable[[], float] | None = None
    """Returns the seconds that its response has waited, so far, for its client to read."""
    on_wait: Callable[[], object] | None = None
    on_admit: Callable[[], object] | None = None
    arrived_s: float = 0.0
    prepared_s: float = 0.0
    """Seconds from its arrival until it asked for its turn: it was validated in that time."""
    admitted_s: float | None = None
    """When it had its turn; None before that."""
    switched: int = 0
    """Activations during its wait."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_epoch = self.epoch

    @property
    def alias(self) -> str:
        """The alias of its model."""
        return self.model.alias

    def step(self, step: RequestStep) -> None:
        """Move on in the table of a request's states. Raises `IllegalTransition`."""
        self.state = advance_request(self.alias, self.state, step)

    @property
    def is_parked(self) -> bool:
        return self.state is RequestState.PARKED

    @property
    def is_over(self) -> bool:
        """Whether all work on it has ended."""
        return self.state is RequestState.OVER

    @property
    def result(self) -> RequestResult:
        """How the request ended, for statistics."""
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
        """Whether it makes no progress until its model is active."""
        return self.is_parked or self.admitted_s is None

    def admit(self, epoch: int, now_s: float) -> None:
        """Give it its turn."""
        self.step(RequestStep.ADMIT)
        self.switched = epoch - self.epoch
        self.epoch = self.first_epoch = epoch
        self.admitted_s, self.wait_for_turn = now_s, None
        if self.on_admit is not None:
            self.on_admit()

    def accepts_stamp(self, alias: str, epoch: int) -> bool:
        """Whether an output with this stamp may belong to the request."""
        return alias == self.alias and self.first_epoch <= epoch <= self.epoch

    @property
    def is_open(self) -> bool:
        """Whether there is something to end: a response, or work that outlives it."""
        is_at_work = self.work is not None and not self.work.done()
        return self.cut is None and (is_at_work or not self.is_answered)

    def end(self, cause: Cut) -> None:
        """End the request, and any work that outlives its response. Only the first cause counts."""
        if self.cut is None:
            self.was_cut = self.is_open  # read first: it is False once `cut` is set
            self.cut = cause  # before `settle`, which would start the countdowns again
            self.step(RequestStep.CUT)
            if self.work is not None:
                self.work.cancel()
            self.settle()
            if self.on_cut is not None:
                self.on_cut()

    def kill(self) -> None:
        """Cancel the task of a request that was ended but still runs."""
        if self.task is not None:
            self.task.cancel()

    def park(self, timeout_s: float, expire: Callable[[], object]) -> None:
        """Freeze the request; call `expire` unless it continues within `timeout_s`."""
        self.step(RequestStep.PARK)
        self.deadline = asyncio.get_running_loop().call_later(timeout_s, expire)
        for countdown in self.countdowns.values():
            countdown.stop()
        if self.on_park is not None:
            self.on_park()

    def count_down(self, request_id: str, seconds: float, ring: Callable[[], object]) -> None:
        """Call `ring` in so many seconds, not counting those in which the request is parked."""
        self.countdowns[request_id] = countdown = Countdown(seconds, ring)
        if not self.is_parked:
            countdown.start()

    def stop_countdown(self, request_id: str) -> None:
        """Idempotent."""
        if (countdown := self.countdowns.pop(request_id, None)) is not None:
            countdown.stop()

    def hold_output(self, epoch: int) -> None:
        """Note that its engine steps again, in `epoch`; hold back output until it is verified."""
        self.epoch = epoch
        self.close_gate()

    def close_gate(self) -> None:
        """Hold back all output until the request is settled."""
        if self.gate is None:
            self.gate = asyncio.get_running_loop().create_future()

    def open_gate(self) -> None:
        """Let output pass again: undo `close_gate`."""
        if self.gate is not None:
            if not self.gate.done():
                self.gate.set_result(None)
            self.gate = None

    def settle(self) -> None:
        """Continue or end: no longer parked, and output that was held back is sent."""
        if self.is_parked:
            self.step(RequestStep.RESUME)
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        if self.cut is None:
            for countdown in self.countdowns.values():
                countdown.start()
        self.open_gate()


current_lease: ContextVar[Lease | None] = ContextVar("current_lease", default=None)
"""The lease of the request that the current task works on."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What the configuration says about one model's residency, and how it takes its turn.

    Times are in seconds, None for never.
    """

    pinned: bool = False
    idle_sleep_s: float | None = None
    idle_unload_s: float | None = None
    priority: int = 0
    max_wait_s: float | None = None
    """None: the server's."""
    weight: float = 1.0

    def max_wait_or(self, default_s: float) -> float:
        """Return after how long a waiting request is due: the model's own time, or the default."""
        return default_s if self.max_wait_s is None else self.max_wait_s


@dataclass(eq=False, slots=True)
class Prefetch:
    """A cold model's files that are being read, or have been read, into memory."""

    limit_bytes: int
    """The most that may be read."""
    read_bytes: int = 0
    """What has been read so far."""
    is_explicit: bool = False
    """Whether a caller asked for exactly this, whatever is expected to be next."""
    task: asyncio.Task[int] = field(init=False)

    @property
    def is_under_way(self) -> bool:
        return not self.task.done()

    @property
    def held_bytes(self) -> int:
        """Bytes of the host budget that it takes."""
        return self.limit_bytes if self.is_under_way else self.read_bytes

    def record_progress(self, read_bytes: int) -> None:
        """Record the progress; called on whatever thread reads."""
        self.read_bytes = read_bytes


@dataclass(eq=False, slots=True)
class Waking:
    """A sleeping model that takes its memory again, in slices, before it is asked for."""

    needs: Usage
    """What it will hold besides what it holds asleep. It counts from the start."""
    progress: WakeProgress | None = None
    """As last reported."""
    given_up: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when what has been taken is to be given back."""
    task: asyncio.Task[None] = field(init=False)
    """Runs until the model is awake, or has given everything back."""

    @property
    def is_given_up(self) -> bool:
        return self.given_up.is_set()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to take."""
        return self.progress is not None and self.progress.is_done

    @property
    def done_bytes(self) -> int:
        return self.progress.done_bytes if self.progress else 0

    @property
    def total_bytes(self) -> int:
        return self.progress.total_bytes if self.progress else self.needs.device

    @property
    def left(self) -> float:
        """The part that is still to be done, from 1 to 0."""
        return 1 - self.done_bytes / self.total_bytes if self.total_bytes else 1.0


NEWEST_UP = 0.5
"""Weight of the newest of several times of bringing a model up."""


@dataclass(eq=False, slots=True)
class Model:
    """One configured model. Its residency changes only through `step`."""

    alias: str
    engine: Engine
    residency: Residency = Residency.COLD
    leases: dict[Lease, None] = field(default_factory=dict)
    """Leases of its requests, in the order of their admission."""
    entered: dict[Lease, None] = field(default_factory=dict)
    """Requests in the mode `auto` that its frontend prepares, or that wait for their turn."""
    extra_requests: int = 0
    """Engine requests beyond one for each of its requests."""
    drained: asyncio.Future[None] | None = None
    """Done when the last lease has ended; a drain of the model waits for it."""
    last_used_s: float | None = None
    failure: str | None = None
    settings: ModelSettings = field(default_factory=ModelSettings)
    pinned: bool = False
    is_verified: bool = False
    """Whether it has passed its verification since it was loaded or woken."""
    up_s: dict[Residency, Average] = field(default_factory=dict)
    """Measured seconds of bringing it up, by the residency from which it came."""
    prefetch: Prefetch | None = None
    """Kept until it is loaded or woken, or the prefetch is cancelled."""
    waking: Waking | None = None
    """Set while it is asleep, and wakes before it is asked for."""

    def __repr__(self) -> str:
        return f"<Model {self.alias} {self.residency.value} in_flight={len(self.leases)}>"

    def step(self, step: Step) -> Residency:
        """Move on the residency ladder; return the residency before."""
        before, self.residency = self.residency, advance(self.alias, self.residency, step)
        return before

    def came_up(self, before: Residency, took_s: float) -> None:
        """Record the seconds of a load or a wake; the first one pays for more than later ones."""
        self.up_s.setdefault(before, Average(NEWEST_UP)).add(took_s)

    def measured_up_s(self, before: Residency) -> float | None:
        """Return the seconds of bringing it up from a residency; None: not measured yet."""
        known = self.up_s.get(before)
        return None if known is None else known.value

    @property
    def resting(self) -> Usage:
        """What it holds in its residency."""
        return self.engine.footprint.at(self.residency)

    @property
    def held(self) -> Usage:
        """What it holds in its residency, plus what it takes to wake before it is asked for."""
        return self.resting + (self.waking.needs if self.waking else Usage())

    @property
    def is_loaded(self) -> bool:
        """Whether it can be activated as it is."""
        return self.residency in (Residency.PARKED, Residency.ACTIVE)

    @property
    def parked(self) -> list[Lease]:
        """Leases of requests that are frozen with its engine."""
        return [lease for lease in self.leases if lease.is_parked]

    @property
    def in_flight(self) -> int:
        """Engine requests of all requests that hold a lease, or will."""
        return len(self.leases) + len(self.entered) + self.extra_requests

    def in_flight_as(self, name: str) -> int:
        """Requests that hold a lease, or will, and name the model this way."""
        return sum(lease.name == name for lease in (*self.leases, *self.entered))


class Registry:
    """The models by alias, in the order of the configuration, and their other names.

    Aliases, additional names and adapters of all models are one set of names.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        model_settings: Mapping[str, ModelSettings] | None = None,
    ) -> None:
        model_settings = model_settings or {}
        self._models = {
            alias: _model(alias, engine, model_settings.get(alias, ModelSettings()))
            for alias, engine in engines.items()
        }
        self._additional_names = {
            name: model for model in self._models.values() for name in model.engine.aliases
        }

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def aliases(self) -> list[str]:
        return list(self._models)

    @property
    def names(self) -> list[str]:
        """Every name that a request may use."""
        adapters = [name for model in self for name in model.engine.adapters]
        return [*self._models, *self._additional_names, *adapters]

    def resolve(self, name: str) -> Model:
        """The model that a request for this name goes to; for an adapter, its base model.

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
        """The model with this alias, additional name or adapter. Raises `UnknownModel`."""
        model = self._models.get(name) or self._additional_names.get(name)
        if model is None:
            model = next((model for model in self if name in model.engine.adapters), None)
        if model is None:
            raise UnknownModel(name, self.names)
        return model

    def model(self, alias: str) -> Model:
        """The model with that alias or additional name.

        Raises:
            UnknownModel: nothing has that name.
            InvalidRequest: it is an adapter; an operation would affect more than the adapter.
        """
        model = self.owner(alias)
        if alias in model.engine.adapters:
            raise InvalidRequest(
                f"{alias!r} is an adapter of model {model.alias!r}; name the model", "model"
            )
        return model


def _model(alias: str, engine: Engine, settings: ModelSettings) -> Model:
    return Model(alias, engine, settings=settings, pinned=settings.pinned)
