"""The messages between the API process and the engine host.

They travel as pickles over one anonymous socket pair that the host inherits from its parent: no
other process has an end of it, so no client can reach it (decision record 0007). Requests and
their outputs never come this way: they use vLLM's own sockets, one pair per model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_hotswap.host.variables import Environment


@dataclass(frozen=True, slots=True)
class SocketPaths:
    """Where a model's frontend binds and its engine connects (ZeroMQ addresses)."""

    input: str
    output: str

    @property
    def folder(self) -> str:
        """The folder of their files."""
        return str(Path(self.input.removeprefix("ipc://")).parent)


@dataclass(frozen=True, slots=True)
class Measure:
    """Report the memory before the first load. Answer: `devices.DeviceMemory`."""

    id: int
    device: Any


@dataclass(frozen=True, slots=True)
class MeasureNow:
    """Report the memory now, while nothing is under way. Answer: `devices.DeviceMemory`.

    If less than `enough_bytes` are free, free memory that allocators keep is given back first.
    """

    id: int
    device: Any
    enough_bytes: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Show that the host is alive, whatever its compute thread does. Answer: its `step_s`."""

    id: int


@dataclass(frozen=True, slots=True)
class Load:
    """Make a model's engine, or load its model again. Answer: `Loaded`.

    `LoadStage` messages come before it.
    """

    id: int
    alias: str
    number: int
    """Which load of this model it is; messages about its engine carry the number."""
    vllm_config: Any
    log_stats: bool
    sockets: SocketPaths
    variables: Environment = field(default_factory=dict)
    """Environment variables to set while this model is worked with."""
    limits_kv: bool = False
    """Whether to give it no more KV memory than all its sequences can use."""


@dataclass(frozen=True, slots=True)
class Activate:
    """Step this engine from now on, and no other one; stamp its outputs. Answer: None."""

    id: int
    alias: str
    stamp: str
    canary_first: bool = False
    """Whether to step nothing before a canary, and nothing beside it."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Give back memory of a model that is not active; its requests are kept. Answer: None.

    If it fails, nothing has changed. If that is impossible, the engine is given up, and
    `EngineFailed` is sent before the answer.
    """

    id: int
    alias: str
    level: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Undo `Sleep`. Answer: None.

    If it fails, the model is unloaded. If there is no room, it is still asleep, and the answer says
    so.
    """

    id: int
    alias: str


@dataclass(frozen=True, slots=True)
class WakeSlice:
    """Take a part of a sleeping model's memory again, while another model is served.

    Answer: `states.WakeProgress`. The model is asleep until `Wake`, which does what is left. If a
    slice fails, the model is asleep, and holds nothing of what slices have taken.
    """

    id: int
    alias: str


@dataclass(frozen=True, slots=True)
class GiveUpWake:
    """Give back a part of what slices have taken. Answer: the bytes that are left."""

    id: int
    alias: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Unload a model that is not active. Answer: None.

    `forget`: give up its sockets, too, because the frontend at their other end is lost.
    """

    id: int
    alias: str
    forget: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process. No answer; the channel closes."""

    id: int


Command = (
    Measure
    | MeasureNow
    | Ping
    | Load
    | Activate
    | Sleep
    | Wake
    | WakeSlice
    | GiveUpWake
    | Unload
    | Stop
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a loaded engine holds, in bytes."""

    kv_bytes: int
    held_bytes: int
    """What the host grew by, without KV memory; 0 if that is unknown."""
    can_discard: bool
    """Whether sleep level 2 can be undone for this model."""
    weights_bytes: int = 0
    """What sleep level 2 gives back besides KV memory; 0 if that is unknown."""
    sleep_bytes: int = 0
    """What sleep level 1 gives back on the device, KV memory included; 0 if that is unknown."""
    copy_bytes: int = 0
    """What sleep level 1 takes of the host's memory; 0 if that is unknown."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The host has imported vLLM and accepts commands."""


@dataclass(frozen=True, slots=True)
class LoadStage:
    """A load reached a stage."""

    alias: str
    stage: str


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """One engine died; the host and the other engines continue."""

    alias: str
    load: int
    """The number of the load whose engine died."""
    cause: str


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of the command `id`, or why it failed."""

    id: int
    result: Any = None
    error: str | None = None
    lacks_room: bool = False
    """Whether it failed for lack of memory, and has changed nothing."""


Message = Ready | LoadStage | EngineFailed | CommandResult


CANARY_ID = "hotswap-canary-"
"""Prefix of the ids of requests for canaries."""
