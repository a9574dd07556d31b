"""IP addresses: parsing, and comparing what they mean."""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from functools import lru_cache

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def ip_address(text: str) -> IPAddress:
    """Parse an address, without the zone (`%eth0`) that may follow it; IPv4 in IPv6 becomes IPv4.

    `::ffff:127.0.0.1` reaches what `127.0.0.1` does. Source: RFC 4291, section 2.5.5.2.

    Raises:
        ValueError: it is not an IP address.
    """
    return _without_zone(text.partition("%")[0])


@lru_cache(maxsize=4096)
def _without_zone(text: str) -> IPAddress:
    """Parse an address. Other texts raise, so the cache holds only short ones."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_loopback(text: str) -> bool:
    """Whether it is a loopback address; a name is not."""
    try:
        return ip_address(text).is_loopback
    except ValueError:
        return False


NETWORK_BITS = 64
"""First bits of an IPv6 address: the network that one client usually gets. Source: RFC 6177."""


def network_of(address: str) -> Hashable:
    """Return what counts as one client: an IPv4 address, or a network of IPv6."""
    if ":" not in address:
        return address
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        return int(found) >> (128 - NETWORK_BITS)
    return str(found)
