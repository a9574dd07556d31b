"""Connections of clients, before and beside their requests."""

from __future__ import annotations

from vllm_hotswap.connections.arrivals import Acceptor, Arrival
from vllm_hotswap.connections.connections import Config, Connection
from vllm_hotswap.connections.listen import (
    DEFAULT_PORT,
    LAST_ANSWERS_S,
    Listener,
    ListenFlags,
    Refresher,
    check_address,
)

__all__ = [
    "DEFAULT_PORT",
    "LAST_ANSWERS_S",
    "Acceptor",
    "Arrival",
    "Config",
    "Connection",
    "ListenFlags",
    "Listener",
    "Refresher",
    "check_address",
]
