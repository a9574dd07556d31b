"""What the engine host does for each command, on its compute thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from vllm_hotswap.errors import one_line
from vllm_hotswap.host.loop import EngineLoop
from vllm_hotswap.host.messages import (
    Activate,
    Answer,
    Command,
    Configure,
    EngineFailed,
    Load,
    Loaded,
    LoadStage,
    Message,
)

log = logging.getLogger("vllm_hotswap.host")


class Obedience:
    """Turns commands into work on the compute thread and sends the answers.

    The mutable state is `_kv_bytes`, set once by `Configure`; everything else is the loop's.
    """

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._channel_send = send
        self._send_lock = threading.Lock()
        self._kv_bytes: Mapping[str, int] = {}
        self.loop = EngineLoop(self._engine_failed)

    def prepare(self) -> None:
        """Do once what every load would otherwise wait for: the imports."""
        from vllm_hotswap import compat

        compat.prepare_host()

    def take(self, command: Command) -> None:
        """Have `command` obeyed on the compute thread. Called by the channel's thread."""
        self.loop.submit(lambda: self._answer(command))

    def _answer(self, command: Command) -> None:
        try:
            self._send(Answer(command.id, result=self._obey(command)))
        except Exception as error:
            log.exception("event=command_failed command=%s", type(command).__name__)
            self._send(Answer(command.id, error=one_line(error)))

    def _obey(self, command: Command) -> Any:
        match command:
            case Configure():
                return self._configure(command)
            case Load():
                return self._load(command)
            case Activate(alias=alias):
                return self.loop.activate(alias)
            case _:
                raise TypeError(f"unknown command {command!r}")

    def _configure(self, command: Configure) -> Mapping[str, int]:
        from vllm_hotswap import compat
        from vllm_hotswap.host.memory import share_kv_memory

        budget = compat.memory_budget_bytes(command.memory_fraction)
        self._kv_bytes = share_kv_memory(command.models, budget)
        return self._kv_bytes

    def _load(self, command: Load) -> Loaded:
        from vllm_hotswap import compat
        from vllm_hotswap.host.engine import HostedEngine
        from vllm_hotswap.host.progress import reporting_to

        if self.loop.has(command.alias):
            raise ValueError(f"engine {command.alias!r} is loaded already")
        config = command.vllm_config
        config.cache_config.kv_cache_memory_bytes = self._kv_bytes[command.alias]
        before = time.monotonic()
        with (
            reporting_to(lambda stage: self._send(LoadStage(command.alias, stage))),
            compat.collecting_failed_load(),
        ):
            engine = HostedEngine(
                config,
                compat.executor_class(config),
                command.log_stats,
                command.sockets,
                self.loop.ring,
            )
        self.loop.add(command.alias, engine)
        log.info("event=loaded model=%s seconds=%.2f", command.alias, time.monotonic() - before)
        return Loaded(compat.weights_bytes(engine), engine.kv_bytes())

    def _engine_failed(self, alias: str, error: Exception) -> None:
        log.error("event=engine_failed model=%s", alias, exc_info=error)
        self._send(EngineFailed(alias, one_line(error)))

    def _send(self, message: Message) -> None:
        # A parent that is gone is noticed by the thread that reads the channel.
        with self._send_lock, suppress(OSError):
            self._channel_send(message)
