"""Residency of a model, state of a request and phases of a switch, with their transition tables.

Nothing else in the package changes a residency or a request's state: callers use `advance` and
`advance_request`, which refuse what the tables do not list. The table of residencies is printed
into `docs/internals/residency.md`, that of requests into `docs/internals/design.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from vllm_hotswap.errors import HotswapError

DrainAction = Literal["abort", "park", "refuse"]
"""What happens to requests that still run when a drain times out."""


class Residency(StrEnum):
    """Where a model's weights and KV memory are, and whether its engine is stepped."""

    COLD = "cold"
    """Nothing but the validated configuration."""
    LOADING = "loading"
    """Its engine is being made in the engine host."""
    PARKED = "parked"
    """Weights and KV stay on the device; the engine is not stepped (vLLM sleep level 0)."""
    ACTIVE = "active"
    """Weights and KV on the device; the engine is stepped."""
    ASLEEP = "asleep"
    """KV memory is given back, weights stay in host memory (vLLM sleep level 1)."""
    DISCARDED = "discarded"
    """Weights are dropped, too; structure and compiled code stay (vLLM sleep level 2)."""
    FAILED = "failed"
    """Its engine died after it had been loaded; the model is cold again when it is next needed."""


class Step(StrEnum):
    """What may happen to a model's residency."""

    LOAD = "load"
    LOADED = "loaded"
    LOAD_FAILED = "load_failed"
    ACTIVATE = "activate"
    PARK = "park"
    SLEEP = "sleep"
    DISCARD = "discard"
    WAKE = "wake"
    WAKE_FAILED = "wake_failed"
    UNLOAD = "unload"
    FAIL = "fail"
    REVIVE = "revive"


TRANSITIONS: Mapping[Residency, Mapping[Step, Residency]] = {
    # An engine without a frontend counts as cold, and can die, too.
    Residency.COLD: {Step.LOAD: Residency.LOADING, Step.FAIL: Residency.FAILED},
    Residency.LOADING: {
        Step.LOADED: Residency.PARKED,
        Step.LOAD_FAILED: Residency.COLD,
        Step.FAIL: Residency.FAILED,
    },
    Residency.PARKED: {
        Step.ACTIVATE: Residency.ACTIVE,
        Step.SLEEP: Residency.ASLEEP,
        Step.DISCARD: Residency.DISCARDED,
        Step.UNLOAD: Residency.COLD,
        Step.FAIL: Residency.FAILED,
    },
    Residency.ACTIVE: {Step.PARK: Residency.PARKED, Step.FAIL: Residency.FAILED},
    Residency.ASLEEP: {
        Step.WAKE: Residency.PARKED,
        Step.WAKE_FAILED: Residency.COLD,
        Step.DISCARD: Residency.DISCARDED,
        Step.UNLOAD: Residency.COLD,
        Step.FAIL: Residency.FAILED,
    },
    Residency.DISCARDED: {
        Step.WAKE: Residency.PARKED,
        Step.WAKE_FAILED: Residency.COLD,
        Step.UNLOAD: Residency.COLD,
        Step.FAIL: Residency.FAILED,
    },
    Residency.FAILED: {Step.REVIVE: Residency.COLD},
}


LADDER = (Residency.ACTIVE, Residency.PARKED, Residency.ASLEEP, Residency.DISCARDED, Residency.COLD)
"""The residencies in which a model may stay, from the one that holds the most memory to the one
that holds none."""

DOWN: Mapping[Residency, Step] = {
    Residency.PARKED: Step.PARK,
    Residency.ASLEEP: Step.SLEEP,
    Residency.DISCARDED: Step.DISCARD,
    Residency.COLD: Step.UNLOAD,
}
"""The step that takes a model down to a residency."""


def is_below(lower: Residency, upper: Residency) -> bool:
    """Whether `lower` is further down the ladder than `upper`."""
    return LADDER.index(lower) > LADDER.index(upper)


@dataclass(frozen=True, slots=True)
class WakeProgress:
    """How far a wake in slices has come, in bytes of device memory."""

    done_bytes: int
    """What the model has back; the copies of the last slice may still be under way."""
    total_bytes: int

    @property
    def is_done(self) -> bool:
        return self.done_bytes >= self.total_bytes


class SwitchPhase(StrEnum):
    """Phases of a switch, in order; the words are the same in logs, metrics and events."""

    VALIDATE = "validate"
    DRAIN = "drain"
    MAKE_ROOM = "make_room"
    BRING_UP = "bring_up"
    ACTIVATE = "activate"
    VERIFY = "verify"


class RequestState(StrEnum):
    """Where a request is between its entry and its last byte."""

    ENTERED = "entered"
    """It has a model. Its engine has nothing of it yet, or has no more to do for it now."""
    WAITING = "waiting"
    """It waits for its turn, in the mode `auto`."""
    ADMITTED = "admitted"
    """It has had its turn: a drain of its model waits for it."""
    PARKED = "parked"
    """It is frozen with its engine."""
    ENDING = "ending"
    """It has been aborted, and has a moment to tell its client."""
    OVER = "over"


class RequestStep(StrEnum):
    """What may happen to a request."""

    WAIT = "wait"
    ADMIT = "admit"
    PARK = "park"
    RESUME = "resume"
    SUSPEND = "suspend"
    """An idle WebSocket leaves a drain."""
    CUT = "cut"
    END = "end"


REQUEST_TRANSITIONS: Mapping[RequestState, Mapping[RequestStep, RequestState]] = {
    RequestState.ENTERED: {
        RequestStep.WAIT: RequestState.WAITING,
        RequestStep.ADMIT: RequestState.ADMITTED,
        RequestStep.CUT: RequestState.ENDING,
        RequestStep.END: RequestState.OVER,
    },
    RequestState.WAITING: {
        RequestStep.ADMIT: RequestState.ADMITTED,
        RequestStep.CUT: RequestState.ENDING,
        RequestStep.END: RequestState.OVER,
    },
    RequestState.ADMITTED: {
        RequestStep.PARK: RequestState.PARKED,
        RequestStep.SUSPEND: RequestState.ENTERED,
        RequestStep.CUT: RequestState.ENDING,
        RequestStep.END: RequestState.OVER,
    },
    RequestState.PARKED: {
        RequestStep.RESUME: RequestState.ADMITTED,
        RequestStep.CUT: RequestState.ENDING,
        RequestStep.END: RequestState.OVER,
    },
    # Its turn may still come while it ends, and a WebSocket may become idle: neither revives it.
    RequestState.ENDING: {
        RequestStep.ADMIT: RequestState.ENDING,
        RequestStep.SUSPEND: RequestState.ENDING,
        RequestStep.END: RequestState.OVER,
    },
    # Whatever ends all requests may find one that has ended by itself a moment ago.
    RequestState.OVER: {RequestStep.CUT: RequestState.OVER},
}


class ServerState(StrEnum):
    """What the server as a whole is doing."""

    SERVING = "serving"
    SWITCHING = "switching"
    IDLE = "idle"
    """No model is active, after a while without requests: the next request brings one up."""
    RECOVERING = "recovering"
    """The engine host, or the active engine, died; it is being brought back."""
    DEGRADED = "degraded"
    """No model is active, and bringing one back has failed; it is tried again."""
    STOPPING = "stopping"
    FAILED = "failed"
    """The engine host has died too often; the server exits."""


class IllegalTransition(HotswapError):
    """The table has no such step. The state stays as it was."""

    def __init__(self, what: str, state: StrEnum, step: StrEnum) -> None:
        super().__init__(f"{what} is {state.value}: step {step.value!r} is not possible")


def advance(alias: str, residency: Residency, step: Step) -> Residency:
    """Return the residency after `step`.

    Raises:
        IllegalTransition: the table does not list `step` for `residency`.
    """
    try:
        return TRANSITIONS[residency][step]
    except KeyError:
        raise IllegalTransition(f"model {alias!r}", residency, step) from None


def advance_request(alias: str, state: RequestState, step: RequestStep) -> RequestState:
    """Return the state of a request after `step`.

    Raises:
        IllegalTransition: the table does not list `step` for `state`.
    """
    try:
        return REQUEST_TRANSITIONS[state][step]
    except KeyError:
        raise IllegalTransition(f"a request of {alias!r}", state, step) from None
