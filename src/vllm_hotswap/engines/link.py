"""The API process's end of the control channel: starts, commands and watches the engine host.

Runs on the event loop; no threads. Each command has one awaitable answer, and every wait ends
when the host dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_hotswap import failpoints
from vllm_hotswap.errors import EngineUnavailable, HotswapError, NoRoom
from vllm_hotswap.host import Command, CommandResult, Message, Ready, Stop, host_environment

STOP_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
"""Seconds in which the channel must take a command; it holds 200 KB and more."""


class HostLink:
    """A running engine host process.

    The mutable state is `_pending` (awaited answers, by command id), `_ready` and `died`. Only
    `_on_readable` and `_closed` change it, on the event loop. After a death, `spawn` and `watch`
    start anew, with another process.
    """

    def __init__(self, module: str = "vllm_hotswap.host") -> None:
        """`module` is what the process runs."""
        self._module = module
        self._ids = itertools.count(1)
        # The environment before vLLM, which this process imports later, writes into it.
        self._environment = host_environment(os.environ)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection[Command, Message] | None = None
        self.folder = Path()
        """For sockets and other files that belong to this server alone; 0700. Made by `spawn`."""
        self._hold: int | None = None

    def spawn(self) -> None:
        """Start the process; it imports while the caller continues. Needs no running loop."""
        if self._process is None:
            self.folder = Path(tempfile.mkdtemp(prefix="vllm-hotswap-"))
            self._hold = _held(self.folder)
            # Tensor-parallel workers of vLLM meet here, where no other user can put a file under
            # a name that a library will use.
            self._environment["VLLM_RPC_BASE_PATH"] = str(self.folder)
            self._environment["TMPDIR"] = str(self.folder)
        ours, theirs = socket.socketpair()
        # A stopped host must not block this process when a command does not fit into the channel.
        seconds = struct.pack("ll", int(SEND_TIMEOUT_S), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        command = [sys.executable, "-P", "-m", self._module, "--channel", str(theirs.fileno())]
        command += ["--folder", str(self.folder)]
        if hasattr(os, "sched_getaffinity"):
            command += ["--cores", ",".join(map(str, sorted(os.sched_getaffinity(0))))]
        if specification := failpoints.enabled():
            command += ["--failpoints", specification]
        with theirs:  # closed in this process, so that the channel ends with the host
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                process_group=0,  # so that the host can be killed with all that it has started
            )
        self._channel = Connection(ours.detach())

    def watch(self, on_message: Callable[[Message], None]) -> None:
        """Start to listen; call it once for every process, on the event loop."""
        self._on_message = on_message
        loop = asyncio.get_running_loop()
        self.died: asyncio.Future[str] = loop.create_future()
        self._ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._connection.fileno(), self._on_readable)

    async def ready(self) -> None:
        """Wait until the host accepts commands. Raises `EngineUnavailable` if it dies first."""
        await self._ready

    @property
    def pid(self) -> int:
        return self._running.pid

    async def call(self, make: Callable[[int], Command]) -> Any:
        """Send the command that `make` builds from a fresh id; return its answer.

        Raises:
            EngineUnavailable: the host is dead, or dies before it answers.
            NoRoom: there was no memory for it, and nothing has changed.
            HotswapError: the host could not do it; the message says why.
        """
        if self.died.done():
            raise EngineUnavailable(self.died.result())
        command = make(next(self._ids))
        future = asyncio.get_running_loop().create_future()
        self._pending[command.id] = future
        try:
            self._send(command)
            return await future
        finally:
            self._pending.pop(command.id, None)

    def _send(self, command: Command) -> None:
        try:
            self._connection.send(command)
        except OSError as error:  # a part of it may have been sent: nothing can follow it
            why = f"the engine host accepts no commands: {error}"
            self.end(why)
            raise EngineUnavailable(why) from error

    async def stop(self) -> None:
        """Stop the process: ask, then kill it if it has not exited in time. Idempotent."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            with suppress(EngineUnavailable):
                self._send(Stop(next(self._ids)))
            await self.gone()
        self._remove_folder()

    async def gone(self) -> None:
        """Wait until a process that was asked to stop has exited, or kill it."""
        try:
            await asyncio.to_thread(self._running.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill_group()
            await asyncio.to_thread(self._running.wait)

    def kill(self) -> None:
        """Kill the process at once; for a start that failed before there was an event loop."""
        if self._process is not None:
            self._kill_group()
            self._process.wait()
        self._remove_folder()

    def _kill_group(self) -> None:
        """Kill the process, and those that it has started and that may hold memory."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._running.pid, signal.SIGKILL)

    def _remove_folder(self) -> None:
        if self.folder != Path():  # there is one
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None

    def end(self, why: str) -> None:
        """Kill a process that misbehaves; `why` is then the cause of its death."""
        if not self.died.done() and self._process is not None:
            self._kill_group()
            self._closed(why)

    @property
    def _connection(self) -> Connection[Command, Message]:
        assert self._channel is not None, "spawn() comes first"
        return self._channel

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "spawn() comes first"
        return self._process

    def _on_readable(self) -> None:
        try:
            while self._connection.poll():
                self._receive(self._connection.recv())
        except (EOFError, OSError):
            self._closed()

    def _receive(self, message: Message) -> None:
        match message:
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(None)
            case CommandResult(id=id, error=error, result=result):
                future = self._pending.get(id)
                if future is not None and not future.done():
                    if error is None:
                        future.set_result(result)
                    elif message.lacks_room:
                        future.set_exception(NoRoom(error))
                    else:
                        future.set_exception(HotswapError(error))
            case _:
                self._on_message(message)

    def _closed(self, why: str | None = None) -> None:
        if self._connection.closed:
            return
        # First: a closed connection has no descriptor by which to remove the reader.
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()
        how = why or self._how_it_ended()
        self._kill_group()  # workers may have outlived the host
        error = EngineUnavailable(how)
        for future in (self._ready, *self._pending.values()):
            if not future.done():
                future.set_exception(error)
        if not self._stopping and not self.died.done():
            self.died.set_result(how)

    def _how_it_ended(self) -> str:
        try:
            status = self._running.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the engine host closed its control channel"
        if status < 0:
            return f"the engine host was killed by signal {-status}"
        return f"the engine host exited with status {status}"


def _held(folder: Path) -> int:
    """Return a descriptor that keeps a folder, with all that is in it, as long as it is open.

    systemd-tmpfiles removes what has not been used for days, but nothing in a locked folder:
    tmpfiles.d(5), "Age". Where the file system has no locks, the folder is not kept.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # released with the descriptor
    return descriptor
