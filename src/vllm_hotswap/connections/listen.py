"""Where the server listens, and how uvicorn is configured: address, TLS, log, limits.

All of it comes from flags, and is checked before anything slow is done.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_hotswap.api import KnownKey, Outlook, allowed_host
from vllm_hotswap.config import LimitsConfig
from vllm_hotswap.connections.arrivals import MOST_WAITING, in_doubt
from vllm_hotswap.connections.connections import Config, Connections, bounded, deny_kept_place
from vllm_hotswap.connections.forwarded import ForwardedClients, Proxies
from vllm_hotswap.connections.places import Places
from vllm_hotswap.connections.port_file import PortFile, check_port_file
from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.system import (
    Quiet,
    UnixSocket,
    claimed_port,
    give_back,
    is_loopback,
    raised_file_limit,
)

log = logging.getLogger("vllm_hotswap")

DEFAULT_PORT = 8000
"""vLLM's default."""

KEEP_ALIVE_VARIABLE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
KEEP_ALIVE_S = 5
LAST_ANSWERS_S = 3
"""Seconds that clients get, at shutdown, to read the last response of open connections."""

KEPT_FILES = 256
"""Open files that connections may not take."""

TCP_PROBES = MappingProxyType({"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3})
"""Seconds of silence before a client is probed, seconds between probes, and how many."""

HOST_ERRORS = frozenset([errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL])
"""For another machine's address, no IPv6 here, a link-local address without its interface."""

Refresher = Callable[[uvicorn.Config], Any]
"""Starts to watch the TLS files; the object that it returns has `stop` to end that."""


@dataclass(frozen=True, slots=True)
class ListenFlags:
    """The address on the command line, as far as vLLM has no flags for it."""

    uds_mode: int | None = None
    """Mode of the socket's file; None: what the umask leaves."""
    port_file: Path | None = None
    allowed_hosts: Sequence[str] = ()
    forwarded_allow_ips: Sequence[str] = ()
    """Proxies trusted to say where a request comes from; `*`: every client that connects."""
    umask: int | None = None
    """The umask for the socket's file; None: this process's."""

    @property
    def mode(self) -> int | None:
        """Mode of the socket's file; None: what this process's umask leaves."""
        if self.uds_mode is None and self.umask is not None:
            return 0o777 & ~self.umask
        return self.uds_mode

    def check(self, args: argparse.Namespace) -> None:
        """Raise `ConfigError` if a flag cannot work, or not together with vLLM's flags."""
        for host in self.allowed_hosts:
            allowed_host(host)
        Proxies.of(self.forwarded_allow_ips)
        if args.uds == "":
            raise ConfigError("--uds is empty; name a file, or leave it out for TCP")
        if self.uds_mode is not None and not args.uds:
            raise ConfigError("--uds-mode needs --uds")
        if self.port_file is not None:
            if args.uds:
                raise ConfigError("--port-file: with --uds there is no port; leave one of them out")
            check_port_file(self.port_file)


class Listener:
    """The address, bound already, and the rest of uvicorn's configuration.

    The mutable state is the port file, once the port can be used; which log lines were left out;
    and whether the address has been given back.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        bound: socket.socket | UnixSocket,
        log_config: dict[str, Any] | None = None,
        refresher: Refresher | None = None,
        port_file: Path | None = None,
        claim: socket.socket | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        self.args = args
        self.refresher = refresher
        self._bound = bound
        self._claim = claim
        self._proxies = proxies or Proxies()
        self._log_config = log_config
        self._port_path = port_file
        self._port_file: PortFile | None = None
        self._quiet = Quiet(not args.disable_uvicorn_access_log)
        self._is_closed = False

    @classmethod
    def open(
        cls,
        args: argparse.Namespace,
        log_config: dict[str, Any] | None = None,
        refresher: Refresher | None = None,
        flags: ListenFlags | None = None,
    ) -> Listener:
        """Check the flags and bind the address; `close` gives it back.

        Raises:
            ConfigError: a flag cannot work; the message names it.
        """
        flags = flags or ListenFlags()
        flags.check(args)
        make_config(args, log_config, _nothing)
        watched = refresher if args.enable_ssl_refresh else None
        proxies = Proxies.of(flags.forwarded_allow_ips)
        if args.uds:
            bound = UnixSocket.bind(Path(args.uds), flags.mode)
            return cls(args, bound, log_config, watched, proxies=proxies)
        sock = bind(args.host, args.port)
        claim = _claim(sock, args.host)
        return cls(args, sock, log_config, watched, flags.port_file, claim, proxies)

    @property
    def sock(self) -> socket.socket:
        """The bound socket; clients can connect once the server listens on it."""
        return self._bound.sock if isinstance(self._bound, UnixSocket) else self._bound

    @property
    def port(self) -> int | None:
        """The port, for port 0 the one that the system chose; None for a Unix domain socket."""
        if isinstance(self._bound, UnixSocket):
            return None
        port: int = self._bound.getsockname()[1]
        return port

    @property
    def address(self) -> str:
        args = self.args
        if args.uds:
            return f"unix:{args.uds}"
        scheme = "https" if args.ssl_certfile else "http"
        host = args.host or "0.0.0.0"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can connect, browsers among them."""
        if isinstance(self._bound, UnixSocket):
            return False
        return is_loopback(self._bound.getsockname()[0])

    def announce(self) -> None:
        """Announce where clients can connect, now that they can.

        Raises:
            OSError: they cannot: the socket was replaced, or the port file cannot be written.
        """
        if isinstance(self._bound, UnixSocket) and not self._bound.is_in_place:
            raise FileNotFoundError(f"the socket {self.args.uds} was removed, or replaced")
        if self._port_path is not None and self.port is not None:
            self._port_file = PortFile.write(self._port_path, self.port)
        log.info("event=listening address=%s", self.address)

    def close(self) -> None:
        """Give the address back, and remove the files that belong to it. Idempotent."""
        if self._is_closed:
            return  # by now the files may be another server's
        self._is_closed = True
        self._quiet.end()
        self._bound.close()
        give_back(self._claim)
        if self._port_file is not None:
            self._port_file.remove()

    def uvicorn_config(
        self,
        app: ASGIApp,
        limits: LimitsConfig | None = None,
        may_use_kept: Callable[[Scope], bool] = deny_kept_place,
        outlook: Callable[[Scope], Outlook | KnownKey] = in_doubt,
    ) -> Config:
        """Return a loaded configuration that bounds connections, and the log lines they cause.

        Args:
            limits: bounds of heads and connections.
            may_use_kept: whether a request may use a kept place when all others are taken.
            outlook: foresees a request's outcome, as far as its head tells.

        Raises:
            ConfigError: the configuration cannot be loaded.
        """
        limits = _with_flags(limits or LimitsConfig(), self.args)
        files = raised_file_limit()
        most = most_connections(files)
        places = Places(
            min(most, limits.connections or most),
            limits.connections_per_address,
            self._proxies.has,
        )
        served = ForwardedClients(app, self._proxies)
        config = make_config(self.args, self._log_config, served)
        self._quiet.begin()  # not before: only now vLLM's handlers exist, and stay
        shared = Connections(places, limits, may_use_kept)
        shared.door.outlook = outlook
        shared.door.most_waiting = most_waiting(files)
        return bounded(config, shared)


def make_config(
    args: argparse.Namespace, log_config: dict[str, Any] | None, app: ASGIApp
) -> Config:
    """Return uvicorn's configuration, loaded. Raises `ConfigError` if it cannot be loaded."""
    _check_tls(args)
    config = _uvicorn_config(args, log_config, app)
    try:
        config.load()
    except (OSError, ValueError) as error:  # ssl's errors are among them
        raise ConfigError(
            f"TLS cannot be set up with {_given_tls_flags(args)}: {one_line(error)}"
        ) from error
    return config


def _uvicorn_config(
    args: argparse.Namespace, log_config: dict[str, Any] | None, app: ASGIApp
) -> Config:
    given: dict[str, Any] = {"log_config": log_config, "ssl_ciphers": args.ssl_ciphers}
    try:
        return Config(
            app,
            lifespan="off",
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            root_path=args.root_path or "",
            timeout_keep_alive=_keep_alive_s(),
            timeout_graceful_shutdown=LAST_ANSWERS_S,
            proxy_headers=False,  # `ForwardedClients` reads them, where they are wanted
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        if log_config is None:
            raise
        raise ConfigError(f"--log-config-file cannot be used: {_chain(error)}") from error


def check_address(flags: Sequence[str]) -> None:
    """Check that the port is free, before vLLM has been imported to read the flags.

    The port is given back. Flags that cannot be read yet are ignored: `Listener.open` reports them.

    Raises:
        ConfigError: the address cannot be bound; the message names it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--host", "--port", "--uds", "--config"):
        parser.add_argument(name)
    try:
        args, _ = parser.parse_known_args([*flags])
        port = DEFAULT_PORT if args.port is None else int(args.port)
    except (argparse.ArgumentError, ValueError):
        return
    if args.uds is not None or args.config is not None:
        return
    sock = bind(args.host, port)
    give_back(_claim(sock, args.host))
    sock.close()


def bind(host: str | None, port: int) -> socket.socket:
    """Bind the socket to listen on, before anything slow is done.

    Raises:
        ConfigError: the address cannot be bound; the message names it.
    """
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot_bind(host, port, error) from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _notice_vanished_clients(sock)
    try:
        sock.bind((host or "", port))
    except (OSError, OverflowError, UnicodeError) as error:
        sock.close()
        raise _cannot_bind(host, port, error) from error
    sock.set_inheritable(True)
    return sock


def _claim(sock: socket.socket, host: str | None) -> socket.socket | None:
    """Keep other servers off the port while models load: this one does not listen on it yet."""
    address, port = sock.getsockname()[:2]
    try:
        with claimed_port(address, port) as claim:
            return claim
    except OSError as error:
        sock.close()
        raise _cannot_bind(host, port, error) from error


def _notice_vanished_clients(sock: socket.socket) -> None:
    """Enable TCP keep-alive, to end vanished clients' connections; accepted sockets inherit it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_PROBES.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _cannot_bind(host: str | None, port: int, error: Exception) -> ConfigError:
    if isinstance(error, OverflowError):
        return ConfigError(f"--port {port} is not a valid port; choose one from 0 to 65535")
    is_host = isinstance(error, socket.gaierror | UnicodeError) or (
        isinstance(error, OSError) and error.errno in HOST_ERRORS
    )
    reason = error.strerror if isinstance(error, OSError) else one_line(error)
    return ConfigError(
        f"cannot listen on {host or '0.0.0.0'}:{port}: {reason}; "
        f"choose another {'--host' if is_host else '--port'}"
    )


def _with_flags(limits: LimitsConfig, args: argparse.Namespace) -> LimitsConfig:
    """Return the limits, with the bounds of heads lowered to vLLM's flags for them."""
    return replace(
        limits,
        head_bytes=min(limits.head_bytes, args.h11_max_incomplete_event_size),
        head_fields=min(limits.head_fields, args.h11_max_header_count),
    )


def most_connections(files: int) -> int:
    """Return how many connections there may be, with so many open files.

    The files kept back are for models, the files that a load reads, sockets, the engine host, and
    connections that have no place yet.
    """
    return max(files - KEPT_FILES - most_waiting(files), files // 2)


def most_waiting(files: int) -> int:
    """Return how many connections without a place there may be, with so many open files."""
    return min(MOST_WAITING, files // 8)


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
        raise ConfigError(f"{KEEP_ALIVE_VARIABLE}={value!r} is not a whole number") from None


def _chain(error: BaseException) -> str:
    """Return an error's text with that of its cause: there `logging.config` has the reason."""
    return (
        f"{one_line(error)} ({one_line(error.__cause__)})" if error.__cause__ else one_line(error)
    )


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a configuration that is only checked."""
