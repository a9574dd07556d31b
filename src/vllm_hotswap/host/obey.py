"""What the engine host does for each command, on its compute thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm_hotswap.errors import HotswapError, NoRoom, one_line
from vllm_hotswap.failpoints import failpoint
from vllm_hotswap.host import loading
from vllm_hotswap.host.devices import Device, device_of
from vllm_hotswap.host.heap import give_back_free_memory
from vllm_hotswap.host.kv_cache import kv_shares
from vllm_hotswap.host.loop import EngineLoop
from vllm_hotswap.host.messages import (
    Activate,
    Command,
    CommandResult,
    EngineFailed,
    GiveUpWake,
    Load,
    Loaded,
    LoadStage,
    Measure,
    MeasureNow,
    Message,
    Ping,
    Sleep,
    Unload,
    Wake,
    WakeSlice,
)
from vllm_hotswap.host.teardown import collect_leftovers
from vllm_hotswap.host.together import HalfAsleep
from vllm_hotswap.host.variables import Variables
from vllm_hotswap.system import value_text

if TYPE_CHECKING:
    from vllm_hotswap.host.engine import HostedEngine

log = logging.getLogger("vllm_hotswap.host")

MAX_LEFTOVERS = 8
"""How many unloads may leave shells before these are collected, if no pause comes first."""


class VllmCommandHandler:
    """Turns commands into work on the compute thread and sends the answers.

    The mutable state is `_leftovers` (unloads whose shells wait for a collection), the number of
    each model's last load, the environment variables of models, and the engines, which are the
    loop's.
    """

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._channel_send = send
        self._send_lock = threading.Lock()
        self._leftovers = 0
        self._loads: dict[str, int] = {}
        self._variables = Variables()
        self.loop = EngineLoop(self._engine_failed, self._tidy_up)

    def prepare(self) -> None:
        """Import once what every load would otherwise wait for."""
        loading.prepare_host()

    def submit(self, command: Command) -> None:
        """Run `command` on the compute thread. Called by the channel's thread."""
        # Answered here: on the compute thread, it would wait for the step that it asks about.
        if isinstance(command, Ping):
            self._send(CommandResult(command.id, result=self.loop.step_s))
            return
        self.loop.submit(lambda: self._answer(command))

    def _answer(self, command: Command) -> None:
        try:
            answer = CommandResult(command.id, result=self._execute(command))
        except NoRoom as error:
            answer = CommandResult(command.id, error=error.message, lacks_room=True)
        except HotswapError as error:
            answer = CommandResult(command.id, error=error.message)
        except Exception as error:
            log.exception("event=command_failed command=%s", type(command).__name__)
            answer = CommandResult(command.id, error=one_line(error))
        # Not in a handler above: there the exception's traceback may still hold a half-loaded
        # model, and nothing of it could be collected.
        if answer.error is not None and isinstance(command, Load | Wake):
            collect_leftovers()
            give_back_free_memory()
        self._send(answer)

    def _execute(self, command: Command) -> Any:
        match command:
            case Measure(device=device):
                return device.memory()
            case MeasureNow(device=device, enough_bytes=enough_bytes):
                return device.memory_now(enough_bytes)
            case Load(alias=alias, number=number, variables=environment):
                failpoint("host.load", alias)
                self._loads[alias] = number
                self._variables.register(alias, environment)
                with self._variables.applied(alias):
                    return self._load(command)
            case Activate(alias=alias):
                failpoint("host.activate", alias)
                return self._activate(command)
            case Sleep(alias=alias, level=level):
                failpoint("host.sleep", alias)
                return self._sleep(alias, level)
            case Wake(alias=alias):
                failpoint("host.wake", alias)
                with self._variables.applied(alias):
                    return self._wake(alias)
            case WakeSlice(alias=alias):
                failpoint("host.wake_slice", alias)
                return self._loaded(alias).wake_some()
            case GiveUpWake(alias=alias):
                return self._loaded(alias).give_up_wake()
            case Unload(alias=alias, forget=forget):
                failpoint("host.unload", alias)
                self._unload(alias)
                return self.loop.remove(alias) if forget else None
            case _:
                raise TypeError(f"unknown command {command!r}")

    def _load(self, command: Load) -> Loaded:
        from vllm_hotswap.host.progress import reporting_to

        device = device_of(command.vllm_config)
        give_back_free_memory()  # so that memory that was free is not counted as the model's
        before_s, before_bytes = time.monotonic(), device.held_bytes()
        if (engine := self._find(command.alias)) is not None and engine.is_loaded:
            raise HotswapError(f"engine {command.alias!r} is already loaded")
        try:
            with reporting_to(lambda stage: self._on_stage(command.alias, stage)):
                engine = self._make(command)
            can_discard = _can_discard(device, engine)
            weights_bytes = engine.weights_bytes() if can_discard else 0
            sleep_bytes = engine.sleep_bytes() if device.reports_sleep_bytes else (0, 0)
        except BaseException:
            self._unload(command.alias)
            raise
        give_back_free_memory()
        held = device.held_bytes() - before_bytes
        if not device.kv_is_lazy:
            held -= engine.kv_bytes() * kv_shares(command.vllm_config)
        log.info(
            "event=loaded model=%s seconds=%.2f held_bytes=%d",
            value_text(command.alias),
            time.monotonic() - before_s,
            held,
        )
        return Loaded(engine.kv_bytes(), held, can_discard, weights_bytes, *sleep_bytes)

    def _on_stage(self, alias: str, stage: str) -> None:
        self._send(LoadStage(alias, stage))
        failpoint(f"host.load.{stage}", alias)

    def _make(self, command: Load) -> HostedEngine:
        """Return a new engine at the first load, the same one at every later load."""
        from vllm_hotswap.host.compiled import forgetting_failed_load
        from vllm_hotswap.host.engine import HostedEngine
        from vllm_hotswap.host.executor import LoadTerms, loading_on

        terms = LoadTerms(command.sockets.folder, command.limits_kv)
        engine = self._find(command.alias)
        with forgetting_failed_load(), loading_on(terms):
            if engine is not None:
                engine.reload(command.vllm_config, command.log_stats)
                return engine
            engine = HostedEngine(
                command.vllm_config,
                loading.executor_class(command.vllm_config),
                command.log_stats,
                command.sockets,
                self.loop.ring,
            )
        self.loop.add(command.alias, engine)
        return engine

    def _activate(self, command: Activate) -> None:
        engine = self._loaded(command.alias)
        engine.stamp_outputs(command.stamp)
        engine.expect_canary(command.canary_first)
        self.loop.activate(command.alias)
        self._variables.activate(command.alias)

    def _sleep(self, alias: str, level: int) -> None:
        try:
            self._inactive(alias).sleep(level)
        except HalfAsleep as error:
            self.loop.fail_engine(alias, error)
            raise
        finally:
            give_back_free_memory()

    def _wake(self, alias: str) -> None:
        engine = self._loaded(alias)
        try:
            engine.wake()
        except NoRoom:
            raise
        except BaseException:
            self._unload(alias)
            raise

    def _unload(self, alias: str) -> None:
        engine = self._find(alias)
        if engine is not None and engine.is_loaded:
            self._inactive(alias).unload()
            self._leftovers += 1
            if self._leftovers >= MAX_LEFTOVERS:
                self._tidy_up()
            give_back_free_memory()

    def _tidy_up(self) -> None:
        """Collect what unloads have left. It takes half a second, so best when idle."""
        if self._leftovers:
            self._leftovers = 0
            collect_leftovers()
            give_back_free_memory()

    def _find(self, alias: str) -> HostedEngine | None:
        return self.loop.find(alias)  # type: ignore[return-value]  # this module adds no others

    def _loaded(self, alias: str) -> HostedEngine:
        engine = self._find(alias)
        if engine is None or not engine.is_loaded:
            raise HotswapError(f"engine {alias!r} is not loaded")
        return engine

    def _inactive(self, alias: str) -> HostedEngine:
        """Return the engine, which is not stepped from now on."""
        engine = self._loaded(alias)
        self.loop.park(alias)
        return engine

    def _engine_failed(self, alias: str, error: Exception) -> None:
        log.error("event=engine_failed model=%s", value_text(alias), exc_info=error)
        self._leftovers += 1
        self._send(EngineFailed(alias, self._loads[alias], one_line(error)))

    def _send(self, message: Message) -> None:
        # Two threads send: without the lock, bytes of two messages could mix in the channel.
        # A parent that is gone is noticed by the thread that reads the channel.
        with self._send_lock, suppress(OSError):
            self._channel_send(message)


def _can_discard(device: Device, engine: HostedEngine) -> bool:
    return 2 in device.sleep_levels and engine.supports_discard()
