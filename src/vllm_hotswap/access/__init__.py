"""Who may call what: keys, roles and rights."""

from __future__ import annotations

from vllm_hotswap.access.keys import Keys, KeySource, check_sendable, plain_keys, split_keys
from vllm_hotswap.access.rights import (
    DEFAULT,
    EVERYBODY,
    Account,
    Group,
    PerMinute,
    Rights,
    read_members,
    refuse_shared,
)
from vllm_hotswap.access.roles import HOW_TO_OPEN, Access, Caller, KeyFlags, Role, Sharing

__all__ = [
    "DEFAULT",
    "EVERYBODY",
    "HOW_TO_OPEN",
    "Access",
    "Account",
    "Caller",
    "Group",
    "KeyFlags",
    "KeySource",
    "Keys",
    "PerMinute",
    "Rights",
    "Role",
    "Sharing",
    "check_sendable",
    "plain_keys",
    "read_members",
    "refuse_shared",
    "split_keys",
]
