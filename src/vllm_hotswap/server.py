"""Start-up, serving and shutdown of the whole server.

Order at start: the configuration is checked as far as that needs no vLLM; the engine host is
started, so that it imports vLLM while this process does; flags, the address among them, and every
model's configuration go through vLLM; models are loaded; only then are requests accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from vllm_hotswap import __version__, failpoints, terminal
from vllm_hotswap.access import Access, KeyFlags
from vllm_hotswap.app import CrossOrigin, HotswapApp
from vllm_hotswap.compat.versions import require_vllm
from vllm_hotswap.config import ServerConfig
from vllm_hotswap.drain import CUT_GRACE_S
from vllm_hotswap.engines.base import EngineHost
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import EngineUnavailable, one_line
from vllm_hotswap.garbage import no_collection
from vllm_hotswap.listen import LAST_ANSWERS_S, Listener
from vllm_hotswap.progress import EventLog, StartupProgress, waiting
from vllm_hotswap.record import Recorder, head_of
from vllm_hotswap.registry import ModelPolicy
from vllm_hotswap.settings import CONFIG_VARIABLES

log = logging.getLogger("vllm_hotswap")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Uvicorn without signal handlers of its own: `serve` below decides when to stop.

    It calls `on_started` when it accepts requests.
    """

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    config: ServerConfig,
    flags: Sequence[str],
    keys: KeyFlags | None = None,
    record: Path | None = None,
) -> int:
    """Serve until told to stop. Returns the exit status.

    Args:
        config: the checked YAML file.
        flags: flags of `vllm serve`, for the server and as defaults of every model.
        keys: what the command line says of keys, besides `--api-key`.
        record: a new file for a trace of what happens.

    Raises:
        HotswapError: it cannot be started; the message says why.
    """
    access = Access.from_environment(os.environ, keys, config.rights)
    _enable_failpoints()
    require_vllm()
    folders = config.adapter_folders
    recorders = () if record is None else (Recorder(record, head_of(config)),)
    _clean_environment()
    if access.has_files:
        # Until there is a loop to handle it; the engine host never does.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    link = HostLink()
    link.spawn()
    try:
        with no_collection(), waiting("loading vLLM"):
            # These import vLLM: seconds, during which the host does the same.
            from vllm_hotswap import launch
            from vllm_hotswap.compat import frontend, versions
            from vllm_hotswap.engines.vllm import VllmHost

            version = versions.vllm_version()
            if doubt := versions.warning(version):
                log.warning("event=vllm_not_tried %s", doubt)
            namespaces = launch.parse_flags(config, flags)
            args = namespaces[""]
            access.use_user_keys(args.api_key)
            args.api_key = None
            log_config = frontend.uvicorn_log_config(args)
            listener = Listener.open(args, log_config, frontend.certificate_refresher)
            models = launch.prepare(config, namespaces).models
    except BaseException:
        link.kill()
        raise
    host = VllmHost(link, models, config.memory)
    load = [model.alias for model in models if model.load_at_startup]
    progress = StartupProgress(load)
    app = HotswapApp(
        host,
        access,
        config.switching,
        observers=(EventLog(), progress, *recorders),
        vllm_version=version,
        policies=policies(config),
        adapter_folders=folders,
        limits=config.limits,
        recovery=config.recovery,
    )
    try:
        return _run_loop(serve(app, listener, load, config.default_model, progress))
    finally:
        for recorder in recorders:
            recorder.close()


def policies(config: ServerConfig) -> dict[str, ModelPolicy]:
    """What the file says of each model's residency, and of how it takes its turn."""
    return {
        model.alias: ModelPolicy(
            model.pinned,
            model.idle_sleep,
            model.idle_unload,
            model.priority,
            model.max_wait,
            model.weight,
        )
        for model in config.models
    }


def _enable_failpoints() -> None:
    if specification := os.environ.get(failpoints.VARIABLE):
        failpoints.enable(specification)
        log.warning("event=failpoints_enabled specification=%r", specification)


def _clean_environment() -> None:
    """Take out of the environment what has been read already and must not be passed on.

    The first two would open vLLM's development routes and its pickling (the quickstart sets both),
    keys are checked here for all models in one place, and vLLM warns of variables it does not know.
    """
    if os.environ.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", "0") not in ("", "0"):
        log.info("event=ignored variable=VLLM_ALLOW_INSECURE_SERIALIZATION reason='not needed'")
    if os.environ.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0") not in ("", "0"):
        log.info("event=ignored variable=VLLM_ALLOW_RUNTIME_LORA_UPDATING reason='not needed'")
    ours = [name for name in os.environ if name.startswith("VLLM_HOTSWAP_")]
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_API_KEY", *CONFIG_VARIABLES, *ours):
        os.environ.pop(name, None)


async def serve(
    app: HotswapApp,
    listener: Listener,
    load: Sequence[str],
    default: str,
    progress: StartupProgress,
) -> int:
    """Load, serve, stop. Returns the exit status: 0 if it was told to stop.

    Raises:
        HotswapError: it cannot be started; the message says why.
    """
    with _keys_on_hangup(app.access), _stop_signal() as stop:
        try:
            if not await _start(app, load, default, stop):
                return 0
            progress.close()
            return await _serve(app, listener, stop)
        finally:
            progress.close()
            await app.host.stop()


async def _start(
    app: HotswapApp, load: Sequence[str], default: str, stop: asyncio.Future[None]
) -> bool:
    """Load the models; False if the server was told to stop before they were loaded."""
    if not await _first(app.host, _start_host(app), stop):
        return False
    died = app.host.died
    watching = asyncio.create_task(app.coordinator.recovery.watch())
    try:
        if await _first(app.host, app.coordinator.start(load, default), stop, died):
            return True
    finally:
        watching.cancel()
    if died.done():
        raise EngineUnavailable(f"{died.result()} while models were loaded; see the log above")
    return False


async def _start_host(app: HotswapApp) -> None:
    timeout_s = app.recovery.load_timeout
    try:
        async with asyncio.timeout(timeout_s):
            await app.host.start()
    except TimeoutError:
        raise EngineUnavailable(
            f"the engine host was not ready within {timeout_s:g} s (recovery.load_timeout)"
        ) from None


async def _first(
    host: EngineHost, work: Coroutine[Any, Any, None], *ends: asyncio.Future[Any]
) -> bool:
    """Do the work; give it up, and return False, if one of `ends` is done before it."""
    task = asyncio.create_task(work)
    await asyncio.wait([task, *ends], return_when="FIRST_COMPLETED")
    if task.done():
        await task
        return True
    task.cancel()
    await asyncio.wait([task], timeout=CUT_GRACE_S)
    if not task.done():  # it waits for the host, which is busy, or stuck
        host.kill("the server is shutting down")
    await asyncio.gather(task, return_exceptions=True)
    return False


async def _serve(app: HotswapApp, listener: Listener, stop: asyncio.Future[None]) -> int:
    config = listener.uvicorn_config(_with_origins(app, listener.args))
    server = Server(config, on_started=lambda: _announce(app, listener))
    serving = asyncio.create_task(server.serve([listener.sock] if listener.sock else None))
    coordinator = app.coordinator
    with contextlib.ExitStack() as exits:
        for lasting in (
            coordinator.rest_idle_models(),
            coordinator.recovery.watch(),
            app.router.let_go_of_stalled_clients(),
        ):
            exits.callback(asyncio.create_task(lasting).cancel)
        if listener.refresher is not None:
            exits.callback(listener.refresher(config).stop)
        ends: list[asyncio.Future[Any]] = [serving, stop, coordinator.given_up]
        await asyncio.wait(ends, return_when="FIRST_COMPLETED")
        await _shut_down(app, server, serving, listener.args)
    return _exit_status(app, serving, stop)


async def _shut_down(
    app: HotswapApp, server: Server, serving: asyncio.Task[None], args: argparse.Namespace
) -> None:
    """Accept nothing more, let running requests end in `--shutdown-timeout`, end the rest."""
    timeout_s = getattr(args, "shutdown_timeout", 0) or 0
    log.info("event=shutdown drain_timeout_s=%s", timeout_s)
    await app.coordinator.shut_down(timeout_s)
    app.feed.close()
    server.should_exit = True
    await asyncio.wait([serving], timeout=LAST_ANSWERS_S + 1)
    server.force_exit = True
    await asyncio.gather(serving, return_exceptions=True)


def _exit_status(app: HotswapApp, serving: asyncio.Task[None], stop: asyncio.Future[None]) -> int:
    """1 if the server ended by itself, whatever the reason: a supervisor is to restart it."""
    given_up = app.coordinator.given_up
    if given_up.done():
        log.error("event=given_up cause=%r", given_up.result())
        return 1
    error = None if serving.cancelled() else serving.exception()
    if error is not None:
        log.error("event=serving_failed cause=%r", one_line(error))
        return 1
    return 0 if stop.done() else 1


@contextlib.contextmanager
def _keys_on_hangup(access: Access) -> Iterator[None]:
    """Read key files again at every SIGHUP. Without such files it ends the server, as ever."""
    if not access.has_files:
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, access.read_again)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


@contextlib.contextmanager
def _stop_signal() -> Iterator[asyncio.Future[None]]:
    """Done at the first SIGINT or SIGTERM; a second one ends the process at once.

    The engine host sees its channel close then, and ends, too.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def told(number: signal.Signals) -> None:
        if stop.done():
            log.warning("event=ended_at_once signal=%s", number.name)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        else:
            stop.set_result(None)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, told, number)
    try:
        yield stop
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


def _with_origins(app: HotswapApp, args: argparse.Namespace) -> ASGIApp:
    """The application behind vLLM's flags for web pages of other origins, where any is given."""
    if not args.allowed_origins:
        return app
    return CrossOrigin(
        app,
        allow_origins=args.allowed_origins,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
        allow_credentials=args.allow_credentials,
    )


def _announce(app: HotswapApp, listener: Listener) -> None:
    terminal.say(banner(app, listener.address))


def banner(app: HotswapApp, address: str) -> str:
    """What is served, where, and which model is active."""
    coordinator = app.coordinator
    width = max(len(alias) for alias in coordinator.registry.aliases)
    lines = [f"vllm-hotswap {__version__}  {address}  active: {coordinator.active}"]
    for model in coordinator.registry:
        memory = model.engine.memory
        holds = (
            f"weights {memory.weights_bytes / (1 << 20):8.1f} MiB   "
            f"KV {memory.kv_bytes / (1 << 20):8.1f} MiB"
        )
        lines.append(f"  {model.alias:<{width}}  {model.residency.value:<9} {holds}")
    return "\n".join(lines)


def _run_loop(main: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop where it is installed (vLLM brings it), as vLLM's own server does."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
