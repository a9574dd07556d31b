"""`python -m vllm_hotswap.host --channel FD`: the engine host process.

The thread that runs `main` is the compute thread. A second one reads commands from the parent
and passes them on; when the parent is gone, it ends the process at once.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import NoReturn

from vllm_hotswap.garbage import no_collection
from vllm_hotswap.host.messages import Command, Ready, Stop
from vllm_hotswap.host.obey import Obedience
from vllm_hotswap.host.threads import remember_cores, use_all_cores
from vllm_hotswap.platforms import parse_cores
from vllm_hotswap.progress import configure_logging

log = logging.getLogger("vllm_hotswap.host")


def main() -> None:
    parser = argparse.ArgumentParser(prog="vllm_hotswap.host")
    parser.add_argument("--channel", type=int, required=True, help="inherited file descriptor")
    parser.add_argument("--cores", default="", help="cores that threads without a binding may use")
    args = parser.parse_args()
    if args.cores:
        remember_cores(parse_cores(args.cores))
    channel: Connection[object, Command] = Connection(args.channel)
    configure_logging()
    # The parent decides when the host ends; a Ctrl-C in the terminal reaches both, and so may a
    # SIGHUP, at which the parent reads its key files again.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    obedience = Obedience(channel.send)
    threading.Thread(target=_read, args=(channel, obedience), daemon=True, name="channel").start()
    with no_collection():
        obedience.prepare()
    channel.send(Ready())
    try:
        obedience.loop.run()
    except BaseException:
        log.exception("event=compute_thread_failed action=exit")
        _exit(1)


def _read(channel: Connection[object, Command], obedience: Obedience) -> NoReturn:
    """Pass commands on until there are no more, then end the process.

    `os._exit` skips interpreter finalisation, where native threads of torch and ZeroMQ may hang: a
    host that is to end has nothing left to save.
    """
    use_all_cores()
    try:
        while not isinstance(command := channel.recv(), Stop):
            obedience.take(command)
    except (EOFError, OSError):
        log.warning("event=parent_gone action=exit")
        obedience.remove_sockets()
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
    logging.shutdown()
    os._exit(status)


# Worker processes of tensor-parallel models import this module under another name.
if __name__ == "__main__":
    main()
