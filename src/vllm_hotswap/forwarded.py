"""Where a request comes from, by the word of a proxy. Without one that is trusted, nobody's counts.

`X-Forwarded-For` and `X-Forwarded-Proto` are read by uvicorn, for proxies that the operator names.
What is no address is not passed to it: it would stand in every line of the log about the request.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from vllm_hotswap.addresses import ip_address, is_loopback
from vllm_hotswap.errors import ConfigError

log = logging.getLogger("vllm_hotswap")

FLAG = "--forwarded-allow-ips"

EVERYBODY = "*"

_WRITTEN = re.compile(
    r"(?a:(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::(?P<port>[1-9]\d{0,4}))?|([0-9A-Fa-f:.]+))"
)
"""An address, perhaps with a port: `[::1]:80`, `1.2.3.4:80`, `::1`. No zone, which may be text."""

MAX_PORT = 65_535

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies whose word counts, as uvicorn's `--forwarded-allow-ips` names them."""

    names: tuple[str, ...] = ()
    networks: tuple[_Network, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, names: Iterable[str]) -> Proxies:
        """Raises `ConfigError`: one is neither an address, nor a network, nor `*`."""
        given = tuple(names)
        return cls(given, tuple(_network(name) for name in given if name != EVERYBODY))

    def __bool__(self) -> bool:
        return bool(self.names)

    def has(self, address: str) -> bool:
        """Whether that is the address of one."""
        if EVERYBODY in self.names:
            return True
        try:
            found = ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self.networks)


class ForwardedClients:
    """Has an application see the client that a trusted proxy tells of, in place of the proxy.

    A proxy of this machine that is not trusted is told of in the log, once: uvicorn alone would
    trust it. That it has been is the mutable state.
    """

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies
        self._is_told = False
        trusted = EVERYBODY if EVERYBODY in proxies.names else list(proxies.names)
        self._told = ProxyHeadersMiddleware(app, trusted)  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        values = [v for name, v in scope.get("headers", ()) if name == b"x-forwarded-for"]
        if values and not self._is_told:
            self._tell(scope.get("client"))
        app = self._told if self._proxies and all(map(are_addresses, values)) else self._app
        await app(scope, receive, send)  # type: ignore[arg-type]

    def _tell(self, client: tuple[str, int] | None) -> None:
        if client is None or not is_loopback(client[0]) or self._proxies.has(client[0]):
            return
        self._is_told = True
        log.warning(
            "event=forwarded_ignored peer=%s X-Forwarded-For does not count: "
            "if a proxy sent it, name it with %s",
            client[0],
            FLAG,
        )


def are_addresses(value: bytes) -> bool:
    """Whether a value of `X-Forwarded-For` has nothing but IP addresses in it, some with ports."""
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
