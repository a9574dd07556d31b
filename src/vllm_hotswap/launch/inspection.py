"""Inspects the classes of models in this process, or in one other process for all.

vLLM starts a process for each architecture that it has not seen on this machine, which imports all
of vLLM, "to avoid initializing CUDA". Relies on: `_run_in_subprocess` of its registry of models,
called with a function that returns what was found. Checked on vLLM 0.32.0; without such a function,
vLLM inspects as it does by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any

RUN = "_run_in_subprocess"

Look = Callable[[], Any]


@contextmanager
def inspected_here() -> Iterator[None]:
    """Import the classes into this process; for one that makes no engine and ends soon."""
    with _run_by(lambda look, _: look()):
        yield


@contextmanager
def inspected_together() -> Iterator[None]:
    """Import the classes into one other process for all of them, which is started if needed."""
    with ExitStack() as stack:
        pool: list[ProcessPoolExecutor] = []

        def run(look: Look, otherwise: Callable[[Look], Any]) -> Any:
            import cloudpickle  # type: ignore[import-untyped]

            if not pool:
                pool.append(stack.enter_context(_one_process()))
            try:
                return pool[0].submit(_call, cloudpickle.dumps(look)).result()
            except BrokenProcessPool:
                return otherwise(look)

        with _run_by(run):
            yield


@contextmanager
def _run_by(run: Callable[[Look, Callable[[Look], Any]], Any]) -> Iterator[None]:
    from vllm.model_executor.models import registry

    original = getattr(registry, RUN, None)
    if original is None:
        yield
        return
    setattr(registry, RUN, lambda look: run(look, original))
    try:
        yield
    finally:
        setattr(registry, RUN, original)


def _begin() -> None:
    """Prepare the other process: it ends when its parent ends, for whatever reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@contextmanager
def _one_process(begin: Callable[[], None] = _begin) -> Iterator[ProcessPoolExecutor]:
    """Another process. What ends this one does not wait for what that one does: it is killed.

    It imports all of vLLM, which may take minutes, and an interrupt in the middle of the pool's own
    code would leave it waiting for work.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin)
    try:
        yield pool
    except BaseException:
        for process in [*(pool._processes or {}).values()]:  # `kill_workers` from Python 3.14 on
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _call(pickled: bytes) -> Any:
    import cloudpickle

    return cloudpickle.loads(pickled)()
