"""HTTP in and out: our routes, the router, and the relay to a model's application."""

from __future__ import annotations

from vllm_hotswap.api import errors
from vllm_hotswap.api.app import CrossOrigin, HotswapApp
from vllm_hotswap.api.audit import Audited, AuditLog
from vllm_hotswap.api.cross_site import CrossSite, allowed_host
from vllm_hotswap.api.refusals import (
    DOOR,
    DOUBT_S,
    MAX_PAUSE_S,
    SUSPECT_S,
    KnownKey,
    Outlook,
    Refusals,
    address_of,
    clients_of,
)

__all__ = [
    "DOOR",
    "DOUBT_S",
    "MAX_PAUSE_S",
    "SUSPECT_S",
    "AuditLog",
    "Audited",
    "CrossOrigin",
    "CrossSite",
    "HotswapApp",
    "KnownKey",
    "Outlook",
    "Refusals",
    "address_of",
    "allowed_host",
    "clients_of",
    "errors",
]
