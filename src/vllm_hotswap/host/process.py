"""The process of an engine host: its two threads, its channel, and how it ends.

The thread that calls `run` is the compute thread. A second one reads commands from the parent
and passes them on; when the parent is gone, it ends the process at once.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from vllm_hotswap import failpoints
from vllm_hotswap.host.command_handler import CommandHandler
from vllm_hotswap.host.messages import Ready, Stop
from vllm_hotswap.host.platforms import parse_cores
from vllm_hotswap.host.threads import remember_cores, use_all_cores
from vllm_hotswap.system import (
    Quiet,
    configure_logging,
    raised_file_limit,
    shut_out_writers,
    signal_when_orphaned,
)
from vllm_hotswap.tasks import gc_paused

log = logging.getLogger("vllm_hotswap.host")

_quiet = Quiet()


def run(module: str, make: Callable[[Callable[[Any], None]], CommandHandler]) -> NoReturn:
    """Run as the engine host that `HostLink` has started as `python -m MODULE`.

    Args:
        module: the name of the process in its help.
        make: makes what carries out commands, from the function that sends to the parent.
    """
    args = _arguments(module)
    if args.cores:
        remember_cores(parse_cores(args.cores))
    channel: Connection[object, Any] = Connection(args.channel)
    set_up_log()
    if args.failpoints:
        failpoints.enable(args.failpoints)
    # The parent decides when the host ends. A Ctrl-C in the terminal reaches both processes, and so
    # may a SIGHUP, on which the parent reads its key files again.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _prefer_for_oom_kill()
    shut_out_writers()
    raised_file_limit()  # its parent's limit may be lower
    handler = make(channel.send)
    _wake_when_orphaned()
    # Before the imports, which take long: the end of the parent is noticed in that time, too.
    reading = (channel, handler, args.folder)
    threading.Thread(target=_read, args=reading, daemon=True, name="channel").start()
    with gc_paused():
        handler.prepare()
    channel.send(Ready())
    try:
        handler.loop.run()
    except BaseException:
        log.exception("event=compute_thread_failed action=exit")
        _exit(1)


def set_up_log() -> None:
    """Write this package's log; limit vLLM's warnings and errors, which clients may cause.

    vLLM sets up no log of its own here: its loggers have no handler, and their lines no prefix.
    """
    configure_logging()
    _quiet.begin()


def _prefer_for_oom_kill() -> None:
    """Make the kernel kill the host first if memory runs out: it can be restarted."""
    with suppress(OSError):  # not on Linux, or the server was started with a higher value
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def _arguments(module: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=module)
    parser.add_argument("--channel", type=int, required=True, help="inherited file descriptor")
    parser.add_argument("--folder", required=True, help="folder of the server's sockets")
    parser.add_argument("--cores", default="", help="cores that threads without a binding may use")
    parser.add_argument("--failpoints", default="", help="failpoints to enable, for tests")
    return parser.parse_args()


def _wake_when_orphaned() -> None:
    """Resume this process, if it is stopped, when its parent dies, so that it notices."""
    signal_when_orphaned(signal.SIGCONT)


def _read(channel: Connection[object, Any], handler: CommandHandler, folder: str) -> NoReturn:
    """Pass commands on until there are no more, then end the process.

    `os._exit` skips interpreter finalisation, where native threads of torch and ZeroMQ may hang. A
    host that ends has nothing left to save.
    """
    use_all_cores()
    try:
        while not isinstance(command := channel.recv(), Stop):
            handler.submit(command)
    except (EOFError, OSError):
        log.warning("event=parent_gone action=exit")
        shutil.rmtree(folder, ignore_errors=True)  # as the parent would have done
        _exit(1)
    except Exception:
        log.exception("event=command_unreadable action=exit")
        _exit(1)
    _exit(0)


def _exit(status: int) -> NoReturn:
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1)
    _quiet.end()
    logging.shutdown()
    os._exit(status)
