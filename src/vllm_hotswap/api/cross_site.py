"""Refusal of requests that a web page makes without its reader's knowledge.

Browsers say where a request comes from (`Sec-Fetch-Site`, `Origin`), and which name they looked up
to get here (`Host`). Other clients send neither of the first two.
https://fetch.spec.whatwg.org/#origin-header, https://www.w3.org/TR/fetch-metadata/
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import urlsplit

import psutil
from starlette.datastructures import Headers

from vllm_hotswap.errors import ConfigError, CrossOriginRefused, HostRefused
from vllm_hotswap.system import ip_address, log_of_clients

SAFE_METHODS = frozenset(["GET", "HEAD", "OPTIONS"])
"""Methods that change nothing. https://www.rfc-editor.org/rfc/rfc9110#name-safe-methods"""

OWN_SITES = frozenset(["same-origin", "none"])
"""`Sec-Fetch-Site` of a page of this server, and of an address that a user typed."""

DEFAULT_PORTS: Mapping[str, int] = MappingProxyType({"http": 80, "https": 443})
ANY = "*"

_HOST_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


@dataclass(frozen=True, slots=True)
class CrossSite:
    """Decides about requests of web pages."""

    origins: frozenset[str] = frozenset()
    """Origins of `--allowed-origins`."""
    hosts: frozenset[str] = frozenset()
    """Names of `--allowed-hosts`, in lower case, without ports."""
    checks_host: Callable[[], bool] = lambda: False
    """Returns whether `Host` may contain only this machine's own names."""

    @classmethod
    def of(
        cls, origins: Iterable[str], hosts: Iterable[str], checks_host: Callable[[], bool]
    ) -> CrossSite:
        """Make it from the values of both flags, as they were given. Raises as `allowed_host`."""
        return cls(frozenset(origins), frozenset(map(allowed_host, hosts)), checks_host)

    def check_host(self, method: str, path: str, headers: Headers) -> None:
        """Refuse a page whose own name resolves to this machine (DNS rebinding).

        A client that sends no `Host` is not a browser.

        Raises:
            HostRefused: the name is not this machine's.
        """
        host = headers.get("host", "")
        if host and self.checks_host() and not self._is_ours(_name_of(host)):
            log_of_clients.warning(
                "event=host_refused method=%s path=%r host=%r", method, path, host
            )
            raise HostRefused(host)

    def check_origin(self, method: str, path: str, headers: Headers) -> None:
        """Refuse a page of another origin.

        Raises:
            CrossOriginRefused: the browser says that the page is of another origin.
        """
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if not self._may_ask(origin, site, headers.get("host", "")):
            log_of_clients.warning(
                "event=cross_origin_refused method=%s path=%r origin=%r site=%r",
                *(method, path, origin, site),
            )
            raise CrossOriginRefused(origin)

    def _may_ask(self, origin: str | None, site: str | None, host: str) -> bool:
        if origin is not None and (origin in self.origins or ANY in self.origins):
            return True
        if site is not None:
            return site in OWN_SITES
        # Browsers leave `Sec-Fetch-Site` out on plain HTTP to another machine.
        return origin is None or _is_same(origin, host)

    def _is_ours(self, name: str) -> bool:
        if name in self.hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            return _is_own_address(name)
        except ValueError:  # not an address but a name
            machine = socket.gethostname().lower()
            return name in (machine, machine.partition(".")[0])


def allowed_host(text: str) -> str:
    """Return the name that a value of `--allowed-hosts` means, as clients send it in `Host`.

    A port is ignored; of a URL, only the host counts.

    Raises:
        ConfigError: no client could send such a name, for example a wildcard.
    """
    place = text.strip().split("://", 1)[-1]
    with suppress(ValueError):
        return str(ip_address(place))
    with suppress(ValueError):
        name = (urlsplit(f"//{place}").hostname or "").encode("idna").decode("ascii").lower()
        if _HOST_NAME.fullmatch(name.removesuffix(".")) or _is_address(name):
            return name.removesuffix(".")
    raise ConfigError(
        f"--allowed-hosts {text!r} is not a host name; "
        "give each name in full, such as models.example"
    )


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_same(origin: str, host: str) -> bool:
    """Whether both name the same host and port. The scheme does not count: TLS may end at a proxy.

    A port that is left out is the default one of the origin's scheme.
    """
    scheme, separator, place = origin.partition("://")
    default = DEFAULT_PORTS.get(scheme)
    try:
        return bool(separator and host) and _split(place, default) == _split(host, default)
    except ValueError:
        return False


def _split(place: str, default: int | None) -> tuple[str | None, int | None]:
    """Return host, in lower case, and port. Raises `ValueError` if the port is not valid."""
    parts = urlsplit(f"//{place}")
    return parts.hostname, parts.port or default


def _name_of(host: str) -> str:
    """Return the name in `Host`, in lower case, without port, brackets and the DNS root's dot."""
    with suppress(ValueError):
        return str(ip_address(host.strip()))  # an IPv6 one without brackets has colons of its own
    try:
        name = urlsplit(f"//{host.strip()}").hostname or ""
    except ValueError:
        return host
    with suppress(ValueError):
        return str(ip_address(name))
    return name.removesuffix(".")


def _is_own_address(name: str) -> bool:
    """Whether it is an address of this machine. Raises `ValueError` if it is not an IP address."""
    address = ip_address(name)
    if address.is_loopback or address.is_unspecified:
        return True
    interfaces = psutil.net_if_addrs().values()
    known = {entry.address.partition("%")[0] for entries in interfaces for entry in entries}
    return str(address) in known
