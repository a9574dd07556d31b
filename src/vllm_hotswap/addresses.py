"""IP addresses as they are written, and what they mean."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def ip_address(text: str) -> IPAddress:
    """The address, without the zone (`%eth0`) that may follow it; an IPv4 one in IPv6 as IPv4.

    `::ffff:127.0.0.1` reaches what `127.0.0.1` does. Source: RFC 4291, section 2.5.5.2.

    Raises:
        ValueError: it is no IP address.
    """
    return _without_zone(text.partition("%")[0])


@lru_cache(maxsize=4096)
def _without_zone(text: str) -> IPAddress:
    """What is kept is short: of other texts, there is an error."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_loopback(text: str) -> bool:
    """Whether it is an address of this machine alone; a name is none."""
    try:
        return ip_address(text).is_loopback
    except ValueError:
        return False
