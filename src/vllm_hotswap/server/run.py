"""Start-up, serving and shutdown of the whole server.

Order at start: the configuration is checked as far as possible without vLLM. The engine host is
started, so that it imports vLLM while this process does. vLLM parses the flags, the address among
them, and every model's configuration. Models are loaded. Only then are requests accepted.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import uvicorn
from starlette.types import ASGIApp

from vllm_hotswap import __version__, failpoints
from vllm_hotswap.access import HOW_TO_OPEN, Access, KeyFlags
from vllm_hotswap.api import Audited, AuditLog, CrossOrigin, CrossSite, HotswapApp
from vllm_hotswap.config import CONFIG_VARIABLES, ModelsFile, ServerConfig
from vllm_hotswap.connections import (
    LAST_ANSWERS_S,
    Acceptor,
    Arrival,
    Config,
    Connection,
    Listener,
    ListenFlags,
    Refresher,
    check_address,
)
from vllm_hotswap.engines import VLLM_REGISTRIES, HostLink
from vllm_hotswap.errors import EngineUnavailable, one_line
from vllm_hotswap.host import SLEEP_VARIABLE, require_vllm
from vllm_hotswap.models import CUT_GRACE_S, EngineHost, ModelSettings
from vllm_hotswap.simulation import Recorder, trace_header
from vllm_hotswap.system import (
    EarlyStop,
    Stopped,
    doubt,
    forget,
    has_terminal,
    on_hangup,
    raised_file_limit,
    set_aside,
    shut_out_others,
    shut_out_writers,
    stop_signal,
    terminal,
    use_temporary_folder,
)
from vllm_hotswap.tasks import event_loop, gc_paused
from vllm_hotswap.telemetry import EventLog, StartupProgress, waiting

log = logging.getLogger("vllm_hotswap")


class Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: `serve` below decides when to stop.

    It calls `on_started` once it accepts requests.
    """

    def __init__(self, config: Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        assert config.shared is not None
        self._shared = config.shared
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        if self.started:
            acceptors = [self._acceptor(sock) for sock in sockets or ()]
            self.servers = cast("list[Any]", acceptors)
            self._on_started()

    def _acceptor(self, sock: socket.socket) -> Acceptor:
        config, shared, state = self.config, self._shared, self.lifespan.state

        def build(arrival: Arrival) -> Connection:
            return Connection(shared, config, self.server_state, state, arrival)

        return Acceptor(
            sock, shared.door, build, config.backlog, config.ssl, shared.limits.head_timeout
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class Start:
    """What is known while a server starts."""

    config: ServerConfig
    flags: Sequence[str]
    access: Access
    listen: ListenFlags
    early: EarlyStop
    exits: contextlib.ExitStack
    """Callbacks of the server: they run whatever stops it."""
    starting: contextlib.ExitStack
    """Callbacks of the start: they run if the server never gets to serve."""

    def bind(
        self,
        args: argparse.Namespace,
        log_config: dict[str, Any] | None = None,
        refresher: Refresher | None = None,
    ) -> Listener:
        """Bind the address and use the keys from the flags, as vLLM's parser gives them.

        Raises:
            ConfigError: one of them cannot work; the message names it.
        """
        self.access.use_user_keys(args.api_key)
        args.api_key = None
        _warn_of_open_key(args.ssl_keyfile)
        with self.early.held():
            listener = Listener.open(args, log_config, refresher, self.listen)
            self.exits.callback(listener.close)
        return listener


@dataclass(frozen=True, slots=True)
class Prepared:
    """What serves the models; the address is bound."""

    host: EngineHost
    listener: Listener
    load: Sequence[str]
    """Models to load at the start."""
    vllm_version: str


class Engines(Protocol):
    """The source of a server's engines. The methods are called once, in this order."""

    def check(self, flags: Sequence[str]) -> None:
        """Check, before anything is opened, that there are such engines.

        Raises:
            ConfigError: there are not, or the address cannot be bound.
        """

    def check_environment(self) -> None:
        """Note what the engines need of the environment, before it is cleaned."""

    def prepare(self, start: Start) -> Prepared:
        """Create the engines' host, and bind the address.

        Raises:
            HotswapError: it failed; the message says why.
        """


class VllmEngines:
    """vLLM's own engines, in an engine host process."""

    def __init__(self) -> None:
        self._link: HostLink | None = None

    def check(self, flags: Sequence[str]) -> None:
        require_vllm()
        check_address(flags)

    def check_environment(self) -> None:
        self._link = HostLink()

    def prepare(self, start: Start) -> Prepared:
        config, link = start.config, self._link
        assert link is not None
        start.starting.callback(link.kill)
        raised_file_limit()  # the engine host needs it from its start
        with start.early.held():
            link.spawn()
            use_temporary_folder(link.folder)
        with gc_paused(), waiting("loading vLLM"):
            # These import vLLM, which takes seconds; the host imports it at the same time.
            from vllm_hotswap.engines import VllmHost, frontend
            from vllm_hotswap.host import vllm_versions as versions
            from vllm_hotswap.launch import prepare as launch

            version = versions.vllm_version()
            if doubt := versions.warning(version):
                log.warning("event=vllm_not_tried %s", doubt)
            namespaces = launch.parse_flags(config, start.flags)
            args = namespaces[""]
            log_config = frontend.uvicorn_log_config(args)
            listener = start.bind(args, log_config, frontend.certificate_refresher)
            models = launch.prepare(config, namespaces).models
        load = [model.alias for model in models if model.load_at_startup]
        return Prepared(VllmHost(link, models, config.memory), listener, load, version)


def run(
    config: ServerConfig,
    flags: Sequence[str],
    keys: KeyFlags | None = None,
    record: Path | None = None,
    listen: ListenFlags | None = None,
    audit: Path | None = None,
    engines: Engines | None = None,
) -> int:
    """Serve until a signal stops it. Return the exit status.

    Args:
        config: the checked YAML file.
        flags: flags of `vllm serve`, for the server and as defaults of every model.
        keys: what the command line says about keys, besides `--api-key`.
        record: a new file for a trace of what happens.
        listen: what the command line says about the address, besides vLLM's flags.
        audit: a file that gets a line for every request that changes state.
        engines: what generates; vLLM's, if not given.

    Raises:
        HotswapError: it cannot start; the message says why.
    """
    early = EarlyStop()
    early.listen(signal.SIGTERM)
    engines = engines or VllmEngines()
    try:
        return _run(config, flags, keys, record, listen or ListenFlags(), audit, early, engines)
    except Stopped:
        log.info("event=stopped phase=start")
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(
    config: ServerConfig,
    flags: Sequence[str],
    keys: KeyFlags | None,
    record: Path | None,
    listen: ListenFlags,
    audit: Path | None,
    early: EarlyStop,
    engines: Engines,
) -> int:
    listen = replace(listen, umask=shut_out_writers())
    models_file = ModelsFile.read(config.path)
    access = Access.from_environment(os.environ, keys, config.rights)
    _enable_failpoints()
    engines.check(flags)
    # Whatever ends this, everything opened is closed; what the engine host needs, last.
    with contextlib.ExitStack() as exits, early.ended():
        audit_log = _audit_log(audit, exits)
        recorders = () if record is None else (_recorder(record, config, exits, early),)
        shut_out_others()
        engines.check_environment()
        _clean_environment()
        # Until an event loop handles the signal; the engine host ignores it for good.
        if _handles_hangups(access, audit_log):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        else:
            early.listen(signal.SIGHUP)
        starting = exits.enter_context(contextlib.ExitStack())
        start = Start(config, flags, access, listen, early, exits, starting)
        prepared = engines.prepare(start)
        listener, load = prepared.listener, prepared.load
        early.hold()
        progress = StartupProgress(load)
        app = HotswapApp(
            prepared.host,
            access,
            config.switching,
            observers=(EventLog(), progress, *recorders),
            vllm_version=prepared.vllm_version,
            model_settings=model_settings(config),
            adapter_folders=config.adapter_folders,
            limits=config.limits,
            recovery=config.recovery,
            isolation=config.isolation,
            cross_site=cross_site_of(access, listener, listen),
            is_local=lambda: listener.is_loopback or bool(listener.args.uds),
            engine_metrics=VLLM_REGISTRIES,
        )
        default = config.default_model
        serving = serve(app, listener, load, default, progress, models_file, early, audit_log)
        starting.pop_all()  # from here on, `serve` stops the host
        return event_loop.run(serving)


def _recorder(
    path: Path, config: ServerConfig, exits: contextlib.ExitStack, early: EarlyStop
) -> Recorder:
    with early.held():
        recorder = Recorder(path, trace_header(config))
        exits.callback(recorder.close)
    return recorder


def _warn_of_open_key(name: str | None) -> None:
    """Warn of a TLS key that another user may read or replace; uvicorn accepts any."""
    with contextlib.suppress(OSError):  # uvicorn reports it
        if name and (cause := doubt(Path(name))):
            log.warning("event=tls_key_open path=%r cause=%r", name, f"it {cause}")


def _audit_log(path: Path | None, exits: contextlib.ExitStack) -> AuditLog | None:
    """Open the audit log that the flag names, or else the variable."""
    path = path or _audit_variable()
    if path is None:
        return None
    audit = AuditLog(path)
    exits.callback(audit.close)
    return audit


def _audit_variable() -> Path | None:
    name = os.environ.get("VLLM_HOTSWAP_AUDIT_LOG")
    return Path(name) if name else None


def model_settings(config: ServerConfig) -> dict[str, ModelSettings]:
    """Return what the file says about each model's residency, and how it takes its turn."""
    return {
        model.alias: ModelSettings(
            model.pinned,
            model.idle_sleep,
            model.idle_unload,
            model.priority,
            model.max_wait,
            model.weight,
        )
        for model in config.models
    }


def cross_site_of(access: Access, listener: Listener, flags: ListenFlags) -> CrossSite:
    """Return what web pages may do; on loopback without keys, `Host` must name this machine."""
    return CrossSite.of(
        listener.args.allowed_origins or (),
        flags.allowed_hosts,
        lambda: listener.is_loopback and not access.has_keys,
    )


def _enable_failpoints() -> None:
    if specification := os.environ.get(failpoints.VARIABLE):
        failpoints.enable(specification)
        log.warning("event=failpoints_enabled specification=%r", specification)


def _clean_environment() -> None:
    """Remove what has been read already and must not be passed on from the environment.

    The first two would open vLLM's development routes and its pickling (the quickstart sets both).
    Keys are checked here, in one place for all models. vLLM warns of variables it does not know.
    """
    if os.environ.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", "0") not in ("", "0"):
        log.info("event=ignored variable=VLLM_ALLOW_INSECURE_SERIALIZATION reason='not needed'")
    if os.environ.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0") not in ("", "0"):
        log.info("event=ignored variable=VLLM_ALLOW_RUNTIME_LORA_UPDATING reason='not needed'")
    # They are read when models' configurations are made, and where none can be made.
    set_aside([SLEEP_VARIABLE, *CONFIG_VARIABLES])
    ours = {name for name in os.environ if name.startswith("VLLM_HOTSWAP_")}
    forget(["VLLM_SERVER_DEV_MODE", "VLLM_API_KEY", *ours])


async def serve(
    app: HotswapApp,
    listener: Listener,
    load: Sequence[str],
    default: str,
    progress: StartupProgress,
    models_file: ModelsFile | None = None,
    early: EarlyStop | None = None,
    audit: AuditLog | None = None,
) -> int:
    """Load, serve, stop. Return the exit status: 0 if a signal stopped it.

    Args:
        models_file: what SIGHUP compares with.
        early: whether a signal came before this began.
        audit: where requests that change state are written.

    Raises:
        HotswapError: it cannot start; the message says why.
    """
    early = early or EarlyStop()
    with contextlib.ExitStack() as exits:
        further = []
        if _handles_hangups(app.access, audit):
            exits.enter_context(on_hangup(lambda: _read_again(app.access, models_file, audit)))
        else:
            further.append(signal.SIGHUP)
        stop = exits.enter_context(
            stop_signal(*further, at_once=listener.close, is_signalled=lambda: early.is_signalled)
        )
        try:
            if not await _start(app, load, default, stop):
                return 0
            progress.close()
            return await _serve(app, listener, stop, audit)
        finally:
            progress.close()
            listener.close()
            await app.host.stop()


def _handles_hangups(access: Access, audit: AuditLog | None = None) -> bool:
    """Whether SIGHUP reopens files. In a terminal, without such files, it stops the server."""
    return access.has_files or audit is not None or not has_terminal()


def _read_again(access: Access, models_file: ModelsFile | None, audit: AuditLog | None) -> None:
    if audit is not None:
        audit.reopen()
    if access.has_files:
        access.read_again()
    if models_file is not None:
        models_file.warn_if_changed()


async def _start(
    app: HotswapApp, load: Sequence[str], default: str, stop: asyncio.Future[None]
) -> bool:
    """Load the models; False if a signal came before they were loaded."""
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
    """Run the work; cancel it, and return False, if one of `ends` is done first."""
    task = asyncio.create_task(work)
    await asyncio.wait([task, *ends], return_when="FIRST_COMPLETED")
    if task.done():
        await task
        return True
    task.cancel()
    await asyncio.wait([task], timeout=CUT_GRACE_S)
    if not task.done():  # it waits for the host, which is busy or stuck
        host.kill("the server is shutting down")
    await asyncio.gather(task, return_exceptions=True)
    return False


async def _serve(
    app: HotswapApp, listener: Listener, stop: asyncio.Future[None], audit: AuditLog | None
) -> int:
    served = _with_origins(_audited(app, audit), listener.args)
    config = listener.uvicorn_config(served, app.limits, app.may_use_kept_place, app.outlook)
    server = Server(config, on_started=lambda: _announce(app, listener))
    serving = asyncio.create_task(server.serve([listener.sock]))
    coordinator = app.coordinator
    with contextlib.ExitStack() as exits:
        for lasting in (
            coordinator.rest_idle_models(),
            coordinator.watch_device(),
            coordinator.recovery.watch(),
            app.router.disconnect_stalled_clients(),
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
    """Stop accepting, let running requests end within `--shutdown-timeout`, then end the rest."""
    timeout_s = getattr(args, "shutdown_timeout", 0) or 0
    log.info("event=shutdown drain_timeout_s=%s", timeout_s)
    await app.coordinator.shut_down(timeout_s)
    app.feed.close()
    server.should_exit = True
    await asyncio.wait([serving], timeout=LAST_ANSWERS_S + 1)
    server.force_exit = True
    await asyncio.gather(serving, return_exceptions=True)


def _exit_status(app: HotswapApp, serving: asyncio.Task[None], stop: asyncio.Future[None]) -> int:
    """Return 1 if the server stopped by itself, for any reason: a supervisor is to restart it."""
    given_up = app.coordinator.given_up
    if given_up.done():
        log.error("event=given_up cause=%r", given_up.result())
        return 1
    error = None if serving.cancelled() else serving.exception()
    if error is not None:
        log.error("event=serving_failed cause=%r", one_line(error))
        return 1
    return 0 if stop.done() else 1


def _audited(app: HotswapApp, audit: AuditLog | None) -> ASGIApp:
    return app if audit is None else Audited(app, app.routes, app.access, audit)


def _with_origins(app: ASGIApp, args: argparse.Namespace) -> ASGIApp:
    """Wrap the application in vLLM's flags for web pages of other origins, if any is given."""
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
    listener.announce()
    terminal.write_text(banner(app, listener.address))


def banner(app: HotswapApp, address: str) -> str:
    """Describe what is served, where, and which model is active."""
    server = app.coordinator.snapshot()
    width = max(len(model.alias) for model in server.models)
    lines = [f"vllm-hotswap {__version__}  {address}  active: {server.serving.active}"]
    if server.is_fake:
        lines.append("  FAKE ENGINES: answers are made up, no model is loaded")
    for model in server.models:
        holds = (
            f"weights {model.memory.weights_bytes / (1 << 20):8.1f} MiB   "
            f"KV {model.memory.kv_bytes / (1 << 20):8.1f} MiB"
        )
        lines.append(f"  {model.alias:<{width}}  {model.residency.value:<9} {holds}")
    if app.access.is_switching_closed:
        what = "admin routes are" if app.coordinator.is_automatic else "switching is"
        lines.append(f"  {what} closed: {HOW_TO_OPEN}")
    return "\n".join(lines)
