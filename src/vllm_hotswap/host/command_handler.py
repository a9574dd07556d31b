"""From a command of the parent to its answer, whatever it is that carries commands out.

This module does not know vLLM: `commands` has its commands, and `testing.fake_process_host` those
of a host without it.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vllm_hotswap.errors import HotswapError, NoRoom, one_line
from vllm_hotswap.host.loop import EngineLoop
from vllm_hotswap.host.messages import CommandResult, EngineFailed, Ping
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap.host")


class CommandHandler(ABC):
    """Turns commands into work on the compute thread and sends the answers.

    The mutable state is `_loads`, the number of each model's last load. `note_load` alone changes
    it, on the compute thread.
    """

    def __init__(self, send: Callable[[Any], None], when_idle: Callable[[], None]) -> None:
        self._channel_send = send
        self._send_lock = threading.Lock()
        self._loads: dict[str, int] = {}
        self.loop = EngineLoop(self._engine_failed, when_idle)

    @abstractmethod
    def execute(self, command: Any) -> Any:
        """Carry out `command` on the compute thread, and return the result to answer with.

        Raises:
            NoRoom: there was no memory for it, and nothing has changed.
            HotswapError: it could not be done; the message is the answer.
        """

    def prepare(self) -> None:  # noqa: B027  # not every host has to
        """Do once what every command would otherwise wait for."""

    def after_failure(self, command: Any) -> None:  # noqa: B027  # not every host has to
        """Clean up after a command that failed, before the parent gets to know."""

    def after_death(self) -> None:  # noqa: B027  # not every host has to
        """Note that an engine has failed, before the parent gets to know."""

    def submit(self, command: Any) -> None:
        """Run `command` on the compute thread. Called by the channel's thread."""
        # Answered here: on the compute thread, it would wait for the step that it asks about.
        if isinstance(command, Ping):
            self.send(CommandResult(command.id, result=self.loop.step_s))
            return
        self.loop.submit(lambda: self._answer(command))

    def note_load(self, alias: str, number: int) -> None:
        """Note the load that begins; a failure of its engine carries the number."""
        self._loads[alias] = number

    def send(self, message: object) -> None:
        """Send to the parent. May be called from any thread; a parent that is gone is ignored."""
        # Two threads send: without the lock, bytes of two messages could mix in the channel.
        # A parent that is gone is noticed by the thread that reads the channel.
        with self._send_lock, suppress(OSError):
            self._channel_send(message)

    def _answer(self, command: Any) -> None:
        try:
            answer = CommandResult(command.id, result=self.execute(command))
        except NoRoom as error:
            answer = CommandResult(command.id, error=error.message, lacks_room=True)
        except HotswapError as error:
            answer = CommandResult(command.id, error=error.message)
        except Exception as error:
            log.exception("event=command_failed command=%s", type(command).__name__)
            answer = CommandResult(command.id, error=one_line(error))
        # Not in a handler above: there the exception's traceback may still hold a half-loaded
        # model, and nothing of it could be collected.
        if answer.error is not None:
            self.after_failure(command)
        self.send(answer)

    def _engine_failed(self, alias: str, error: Exception) -> None:
        log.error("event=engine_failed model=%s", value_text(alias), exc_info=error)
        self.after_death()
        self.send(EngineFailed(alias, self._loads[alias], one_line(error)))
