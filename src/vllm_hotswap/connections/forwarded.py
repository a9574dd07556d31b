"""Where a request comes from, as a trusted proxy reports it. Reports of others do not count.

uvicorn reads `X-Forwarded-For` and `X-Forwarded-Proto`, for proxies that the operator names.
It does not get a value that is not an address: each log line about the request would show that.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system import ip_address, is_loopback

log = logging.getLogger("vllm_hotswap")

FLAG = "--forwarded-allow-ips"

EVERYBODY = "*"

_WRITTEN = re.compile(
    r"(?a:(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::(?P<port>[1-9]\d{0,4}))?|([0-9A-Fa-f:.]+))"
)
"""An address, perhaps with a port: `[::1]:80`, `1.2.3.4:80`, `::1`. No zone: it may be text."""

MAX_PORT = 65_535

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Proxies:
    """The trusted proxies, as uvicorn's `--forwarded-allow-ips` names them."""

    names: tuple[str, ...] = ()
    networks: tuple[_Network, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, names: Iterable[str]) -> Proxies:
        """Read the names. Raises `ConfigError` for one that is not an address, network or `*`."""
        given = tuple(names)
        return cls(given, tuple(_network(name) for name in given if name != EVERYBODY))

    def __bool__(self) -> bool:
        return bool(self.names)

    def has(self, address: str) -> bool:
        """Whether this is the address of a trusted proxy."""
        if EVERYBODY in self.names:
            return True
        try:
            found = ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self.networks)


class ForwardedClients:
    """Shows an application the client that a trusted proxy reports, instead of the proxy.

    A proxy on this machine that is not trusted is logged once: uvicorn by itself would trust it.
    The mutable state is whether that line was logged.
    """

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies
        self._has_logged = False
        trusted = EVERYBODY if EVERYBODY in proxies.names else list(proxies.names)
        self._forwarded_app = ProxyHeadersMiddleware(app, trusted)  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        values = [v for name, v in scope.get("headers", ()) if name == b"x-forwarded-for"]
        if values and not self._has_logged:
            self._log(scope.get("client"))
        app = (
            self._forwarded_app if self._proxies and all(map(are_addresses, values)) else self._app
        )
        await app(scope, receive, send)  # type: ignore[arg-type]

    def _log(self, client: tuple[str, int] | None) -> None:
        if client is None or not is_loopback(client[0]) or self._proxies.has(client[0]):
            return
        self._has_logged = True
        log.warning(
            "event=forwarded_ignored peer=%s X-Forwarded-For is ignored: "
            "if a proxy sent it, name the proxy with %s",
            client[0],
            FLAG,
        )


def are_addresses(value: bytes) -> bool:
    """Whether a value of `X-Forwarded-For` has only IP addresses in it, some with ports."""
    return all(_is_address(item.strip()) for item in value.decode("latin-1").split(","))


def _is_address(text: str) -> bool:
    if not (found := _WRITTEN.fullmatch(text)):
        return False
    try:
        ipaddress.ip_address(found[1] or found[2] or found[4])
    except ValueError:
        return False
    return int(found["port"] or 1) <= MAX_PORT


def _network(name: str) -> _Network:
    try:
        return ipaddress.ip_network(name)
    except ValueError:
        raise ConfigError(
            f"{FLAG} {name!r} is neither an IP address, nor a network such as 10.0.0.0/8, nor *"
        ) from None
