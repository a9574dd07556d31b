"""Start-up, serving and shutdown of the whole server.

Order at start: the configuration is checked as far as that needs no vLLM; the engine host is
started, so that it imports vLLM while this process does; flags and every model's
configuration go through vLLM; models are loaded; only then are requests accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import uvicorn

from vllm_hotswap import __version__
from vllm_hotswap.access import Access
from vllm_hotswap.app import HotswapApp
from vllm_hotswap.config import CONFIG_VARIABLES, ServerConfig
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.garbage import no_collection
from vllm_hotswap.progress import EventLog, StartupProgress

log = logging.getLogger("vllm_hotswap")

KEEP_ALIVE_S = 5
LAST_ANSWERS_S = 3
"""Seconds that open connections get, at shutdown, to take in their last answer."""


class Server(uvicorn.Server):
    """Uvicorn without signal handlers of its own: `serve` below decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(config: ServerConfig, flags: Sequence[str], admin_keys: Sequence[str] = ()) -> int:
    """Serve until told to stop. Returns the exit status.

    Args:
        config: the checked YAML file.
        flags: flags of `vllm serve`, for the server and as defaults of every model.
        admin_keys: keys that may change the server's state.

    Raises:
        HotswapError: it cannot be started; the message says why.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed in this environment; install the build for your platform "
            "(in a clone, `make setup` installs the one for CPUs)"
        )
    access = Access.from_environment(os.environ, admin_keys)
    _clean_environment()
    link = HostLink()
    link.spawn()
    try:
        with no_collection():
            # These import vLLM: seconds, during which the host does the same.
            from vllm_hotswap.engines.vllm import VllmHost
            from vllm_hotswap.launch import parse_flags, prepare

            namespaces = parse_flags(config, flags)
            args = namespaces[""]
            sock = None if args.uds else bind(args.host, args.port)
            launch = prepare(config, namespaces)
    except BaseException:
        link.kill()
        raise
    access = access.with_user_keys(args.api_key)
    host = VllmHost(link, launch.models)
    progress = StartupProgress([m.alias for m in launch.models if m.load_at_startup])
    app = HotswapApp(host, access, config.switching, observers=(EventLog(), progress))
    load = [model.alias for model in launch.models if model.load_at_startup]
    main = serve(app, args, sock, load, config.default_model, progress)
    return _run_loop(main)


def _clean_environment() -> None:
    """Take out of the environment what has been read already and must not be passed on.

    The first two would open vLLM's development routes and its pickling (the quickstart sets both),
    keys are checked here for all models in one place, and vLLM warns of variables it does not know.
    """
    if os.environ.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", "0") not in ("", "0"):
        log.info("event=ignored variable=VLLM_ALLOW_INSECURE_SERIALIZATION reason='not needed'")
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_API_KEY", "VLLM_HOTSWAP_ADMIN_KEY"):
        os.environ.pop(name, None)
    for name in CONFIG_VARIABLES:
        os.environ.pop(name, None)


async def serve(
    app: HotswapApp,
    args: argparse.Namespace,
    sock: socket.socket | None,
    load: Sequence[str],
    default: str,
    progress: StartupProgress,
) -> int:
    """Load, serve, stop. Returns the exit status: 0 if it was told to stop."""
    stop = _stop_signal()
    try:
        starting = asyncio.create_task(_start(app, load, default))
        if not await _first(starting, stop):
            return 0
        progress.close()
        server = Server(_uvicorn_config(app, args))
        serving = asyncio.create_task(server.serve([sock] if sock else None))
        sys.stdout.write(banner(app, args) + "\n")
        sys.stdout.flush()
        ends: list[asyncio.Future[Any]] = [serving, stop, app.host.died]
        await asyncio.wait(ends, return_when="FIRST_COMPLETED")
        await _shut_down(app, server, serving, args)
        return _exit_status(app)
    finally:
        progress.close()
        await app.host.stop()


async def _start(app: HotswapApp, load: Sequence[str], default: str) -> None:
    await app.host.start()
    await app.coordinator.start(load, default)


async def _first(task: asyncio.Task[None], stop: asyncio.Future[None]) -> bool:
    """Wait for the task; False if the server was told to stop before it had ended."""
    await asyncio.wait([task, stop], return_when="FIRST_COMPLETED")
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False
    await task
    return True


async def _shut_down(
    app: HotswapApp, server: Server, serving: asyncio.Task[None], args: argparse.Namespace
) -> None:
    """Accept nothing more, let running requests end in `--shutdown-timeout`, end the rest."""
    timeout_s = getattr(args, "shutdown_timeout", 0) or 0
    log.info("event=shutdown drain_timeout_s=%s", timeout_s)
    await app.coordinator.shut_down(timeout_s)
    server.should_exit = True
    await asyncio.wait([serving], timeout=LAST_ANSWERS_S + 1)
    server.force_exit = True
    await asyncio.gather(serving, return_exceptions=True)


def _exit_status(app: HotswapApp) -> int:
    died = app.host.died
    if died.done() and not died.cancelled():
        log.error("event=engine_host_died cause=%r", died.result())
        return 1
    return 0


def _stop_signal() -> asyncio.Future[None]:
    """Done at the first SIGINT or SIGTERM."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def told() -> None:
        if not stop.done():
            stop.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told)
    return stop


def bind(host: str | None, port: int) -> socket.socket:
    """The listening socket, bound before anything slow is done.

    Raises:
        ConfigError: the address cannot be bound; the message names it.
    """
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host or "", port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {host or '0.0.0.0'}:{port}: {error.strerror}; choose another --port"
        ) from error
    sock.set_inheritable(True)
    return sock


def banner(app: HotswapApp, args: argparse.Namespace) -> str:
    """What is served, where, and which model is active."""
    coordinator = app.coordinator
    width = max(len(alias) for alias in coordinator.registry.aliases)
    lines = [f"vllm-hotswap {__version__}  {_address(args)}  active: {coordinator.active}"]
    for model in coordinator.registry:
        memory = model.engine.memory
        held = (
            f"weights {memory.weights_bytes / (1 << 20):8.1f} MiB   "
            f"KV {memory.kv_bytes / (1 << 20):8.1f} MiB"
            if model.is_loaded
            else "loaded at its first switch"
        )
        lines.append(f"  {model.alias:<{width}}  {model.residency.value:<7} {held}")
    return "\n".join(lines)


def _address(args: argparse.Namespace) -> str:
    if args.uds:
        return f"unix:{args.uds}"
    scheme = "https" if args.ssl_certfile else "http"
    host = args.host or "0.0.0.0"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"


def _uvicorn_config(app: HotswapApp, args: argparse.Namespace) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        uds=args.uds,
        lifespan="off",
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        root_path=args.root_path or "",
        timeout_keep_alive=int(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", KEEP_ALIVE_S)),
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers or "TLSv1",
    )


def _run_loop(main: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop where it is installed (vLLM brings it), as vLLM's own server does."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
