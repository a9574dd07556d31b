"""What the engine host does for each command, on its compute thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.failpoints import failpoint
from vllm_hotswap.host import loading
from vllm_hotswap.host.command_handler import CommandHandler
from vllm_hotswap.host.devices import Device, device_of
from vllm_hotswap.host.heap import give_back_free_memory
from vllm_hotswap.host.kv_cache import kv_shares
from vllm_hotswap.host.messages import (
    Activate,
    Command,
    GiveUpWake,
    Load,
    Loaded,
    LoadStage,
    Measure,
    MeasureNow,
    Message,
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


class VllmCommandHandler(CommandHandler):
    """Carries out commands with vLLM's engines.

    The mutable state is `_leftovers` (unloads whose shells wait for a collection), the environment
    variables of models, and the engines, which are the loop's. All of it is changed on the compute
    thread.
    """

    def __init__(self, send: Callable[[Message], None]) -> None:
        super().__init__(send, self._tidy_up)
        self._leftovers = 0
        self._variables = Variables()

    def prepare(self) -> None:
        """Import once what every load would otherwise wait for."""
        loading.prepare_host()

    def after_failure(self, command: Command) -> None:
        """Collect what is left of a model that could not be loaded or woken."""
        if isinstance(command, Load | Wake):
            collect_leftovers()
            give_back_free_memory()

    def after_death(self) -> None:
        """Have what is left of a model collected later."""
        self._leftovers += 1

    def execute(self, command: Command) -> Any:
        match command:
            case Measure(device=device):
                return device.memory()
            case MeasureNow(device=device, enough_bytes=enough_bytes):
                return device.memory_now(enough_bytes)
            case Load(alias=alias, number=number, variables=environment):
                failpoint("host.load", alias)
                self.note_load(alias, number)
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
        self.send(LoadStage(alias, stage))
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


def _can_discard(device: Device, engine: HostedEngine) -> bool:
    return 2 in device.sleep_levels and engine.supports_discard()
