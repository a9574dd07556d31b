"""Where the server listens, and what uvicorn is told: address, TLS, log, limits.

All of it comes from flags, and is checked before anything slow is done.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_hotswap.errors import ConfigError, one_line

KEEP_ALIVE_VARIABLE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
KEEP_ALIVE_S = 5
LAST_ANSWERS_S = 3
"""Seconds that open connections get, at shutdown, to take in their last answer."""

WANTED_FILES = 65_535
KEPT_FILES = 256
"""Open files that connections may not take."""

TCP_PROBES = MappingProxyType({"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3})
"""Seconds of silence before a client is probed, seconds between probes, and how many."""

MAX_UDS_BYTES = 107
"""Of a socket's path, on Linux."""

Refresher = Callable[[uvicorn.Config], Any]
"""Begins to watch the TLS files; what it returns ends that with `stop`."""


@dataclass(frozen=True, slots=True)
class Listener:
    """The address, bound already, and everything else that uvicorn is told."""

    args: argparse.Namespace
    sock: socket.socket | None
    """None if a Unix domain socket is listened to, which uvicorn makes."""
    log_config: dict[str, Any] | None = None
    refresher: Refresher | None = None

    @classmethod
    def open(
        cls,
        args: argparse.Namespace,
        log_config: dict[str, Any] | None = None,
        refresher: Refresher | None = None,
    ) -> Listener:
        """Check the flags and bind the address.

        Raises:
            ConfigError: one of them cannot work; the message names it.
        """
        cls(args, None, log_config).uvicorn_config(_nothing)
        if args.uds:
            check_uds(Path(args.uds))
        sock = None if args.uds else bind(args.host, args.port)
        return cls(args, sock, log_config, refresher if args.enable_ssl_refresh else None)

    @property
    def address(self) -> str:
        args = self.args
        if args.uds:
            return f"unix:{args.uds}"
        scheme = "https" if args.ssl_certfile else "http"
        host = args.host or "0.0.0.0"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"

    def uvicorn_config(self, app: ASGIApp) -> uvicorn.Config:
        """A loaded configuration. Raises `ConfigError` if it cannot be loaded."""
        _check_tls(self.args)
        config = self._make_config(app)
        # As vLLM does, for a uvicorn that reads it.
        config.h11_max_header_count = self.args.h11_max_header_count  # type: ignore[attr-defined]
        try:
            config.load()
        except (OSError, ValueError) as error:  # ssl's errors are among them
            raise ConfigError(
                f"TLS cannot be set up with {_given_tls_flags(self.args)}: {one_line(error)}"
            ) from error
        return config

    def _make_config(self, app: ASGIApp) -> uvicorn.Config:
        args = self.args
        given: dict[str, Any] = {"log_config": self.log_config, "ssl_ciphers": args.ssl_ciphers}
        try:
            return uvicorn.Config(
                app,
                host=args.host,
                port=args.port,
                uds=args.uds,
                lifespan="off",
                log_level=args.uvicorn_log_level,
                access_log=not args.disable_uvicorn_access_log,
                root_path=args.root_path or "",
                timeout_keep_alive=_keep_alive_s(),
                timeout_graceful_shutdown=LAST_ANSWERS_S,
                limit_concurrency=most_connections(),
                h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
                ssl_keyfile=args.ssl_keyfile,
                ssl_certfile=args.ssl_certfile,
                ssl_ca_certs=args.ssl_ca_certs,
                ssl_cert_reqs=args.ssl_cert_reqs,
                **{name: value for name, value in given.items() if value is not None},
            )
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            if self.log_config is None:
                raise
            raise ConfigError(f"--log-config-file cannot be used: {_chain(error)}") from error


def bind(host: str | None, port: int) -> socket.socket:
    """The listening socket, bound before anything slow is done.

    Raises:
        ConfigError: the address cannot be bound; the message names it.
    """
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _notice_vanished_clients(sock)
    try:
        sock.bind((host or "", port))
    except (OSError, OverflowError, UnicodeError) as error:
        sock.close()
        raise _cannot_bind(host, port, error) from error
    sock.set_inheritable(True)
    return sock


def _notice_vanished_clients(sock: socket.socket) -> None:
    """Have connections end whose clients are gone without a word; they take this over."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_PROBES.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _cannot_bind(host: str | None, port: int, error: Exception) -> ConfigError:
    if isinstance(error, OverflowError):
        return ConfigError(f"--port {port} is no port; choose one from 0 to 65535")
    is_name = isinstance(error, socket.gaierror | UnicodeError)
    reason = error.strerror if isinstance(error, OSError) else one_line(error)
    return ConfigError(
        f"cannot listen on {host or '0.0.0.0'}:{port}: {reason}; "
        f"choose another {'--host' if is_name else '--port'}"
    )


def most_connections() -> int:
    """How many connections there may be; more are answered 503.

    The soft limit of open files is raised, as vLLM does for its server; what is kept back of it is
    for the models: files that a load reads, sockets, the engine host.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = WANTED_FILES if soft == resource.RLIM_INFINITY else soft
    return max(files - KEPT_FILES, files // 2)


def check_uds(path: Path) -> None:
    """Raises `ConfigError` if no socket can be made at that path."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--uds: the folder {str(folder)!r} does not exist")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--uds: the folder {str(folder)!r} cannot be written")
    if path.exists() and not path.is_socket():
        raise ConfigError(f"--uds: {str(path)!r} exists and is no socket")
    if len(os.fsencode(path)) > MAX_UDS_BYTES:
        raise ConfigError(f"--uds: {str(path)!r} is longer than {MAX_UDS_BYTES} bytes")


def _check_tls(args: argparse.Namespace) -> None:
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(args, name)
        if path and not os.access(path, os.R_OK):
            raise ConfigError(f"{_flag(name)}: the file {path!r} cannot be read")
    if args.ssl_keyfile and not args.ssl_certfile:
        raise ConfigError("--ssl-keyfile needs --ssl-certfile")


def _given_tls_flags(args: argparse.Namespace) -> str:
    names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ciphers", "ssl_cert_reqs")
    return " ".join(f"{_flag(name)} {getattr(args, name)}" for name in names if getattr(args, name))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _keep_alive_s() -> int:
    value = os.environ.get(KEEP_ALIVE_VARIABLE, str(KEEP_ALIVE_S))
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{KEEP_ALIVE_VARIABLE}={value!r} is no whole number") from None


def _chain(error: BaseException) -> str:
    """An error with its cause, which is where `logging.config` has the reason."""
    return (
        f"{one_line(error)} ({one_line(error.__cause__)})" if error.__cause__ else one_line(error)
    )


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a configuration that is only tried."""
