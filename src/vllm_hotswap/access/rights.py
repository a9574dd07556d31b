"""What a request may ask of the server, depending on its key.

A request asks with two headers. The rights of its key's group limit what it gets, and say whether
it may cause a switch. Pure: headers and rights in, terms out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Protocol

from vllm_hotswap.access.keys import Keys, KeySource
from vllm_hotswap.errors import ConfigError, InvalidRequest
from vllm_hotswap.scheduling import DEFAULT_TERMS, RequestTerms

DEFAULT = "default"
"""The group of all callers that are in no other one."""

PRIORITY_HEADER = "x-hotswap-priority"
MAX_WAIT_HEADER = "x-hotswap-max-wait"
HIGHEST_PRIORITY = 100

_PRIORITY = re.compile(r"[+-]?\d{1,3}", re.ASCII)
_SECONDS = re.compile(r"\d{1,6}(\.\d{1,9})?", re.ASCII)
_MAX_SHOWN = 40


@dataclass(frozen=True, slots=True)
class PerMinute:
    """Limits of each key, per minute; None: as `limits` says, 0: unlimited."""

    requests: int | None = None
    tokens: int | None = None
    switches: int | None = None


@dataclass(frozen=True, slots=True)
class Rights:
    """What requests of one group may do."""

    group: str = DEFAULT
    switch_to: frozenset[str] | None = None
    """Aliases; None: all."""
    max_priority: int = 0
    min_max_wait_s: float = 5.0
    per_minute: PerMinute = PerMinute()

    def may_switch_to(self, alias: str) -> bool:
        return self.switch_to is None or alias in self.switch_to

    def bound(
        self, asked: RequestTerms, alias: str, own: RequestTerms = DEFAULT_TERMS
    ) -> RequestTerms:
        """Return the terms that a request for a model gets.

        `own` are the terms of its model; asking for more never makes a request worse off.
        """
        priority, wait_s = asked.priority, asked.max_wait_s
        if priority is not None:
            priority = min(priority, max(self.max_priority, own.priority or 0))
        if wait_s is not None:
            least_s = self.min_max_wait_s
            if own.max_wait_s is not None:
                least_s = min(least_s, own.max_wait_s)
            wait_s = max(wait_s, least_s)
        rule = f"rights.{self.group}.switch_to"
        return RequestTerms(priority, wait_s, self.may_switch_to(alias), rule)


ADMIN = Rights("admin", max_priority=HIGHEST_PRIORITY, min_max_wait_s=0.0)
"""Admins may do everything."""


@dataclass(frozen=True, slots=True)
class Account:
    """The account a request counts against: a group, or one key outside of all groups."""

    name: str = ""
    key: str = ""
    """The key's fingerprint; empty without a key."""
    is_admin: bool = False
    is_bounded: bool = False
    """Whether there may be other accounts, for which something has to be left."""
    group: str = ""
    per_minute: PerMinute = PerMinute()


EVERYBODY = Account()
"""All callers, where no keys are required."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rights, the keys that have them, and where that is written."""

    rights: Rights
    place: str
    source: KeySource = field(default_factory=KeySource)


def read_members(groups: Iterable[Group]) -> list[tuple[Rights, Keys]]:
    """Return the keys of every group, as its file has them now.

    Raises:
        ConfigError: a file cannot be used, or a key is in two groups; the message has the place.
    """
    members = [(group, group.source.read()) for group in groups]
    refuse_shared(members)
    return [(group.rights, keys) for group, keys in members]


def refuse_shared(members: Sequence[tuple[Group, Keys]]) -> None:
    """Check that no key is in two groups. Raises `ConfigError`."""
    for (one, ones), (other, others) in combinations(members, 2):
        if ones.shared(others):
            raise ConfigError(
                f"{other.place}: one of its keys is also in {one.place}; a key may be in one "
                "group only"
            )


class Headers(Protocol):
    """The header fields of a request, by lower-case name."""

    def get(self, key: str, default: str, /) -> str: ...

    def getlist(self, key: str) -> Sequence[str]: ...


def read_terms(headers: Headers) -> RequestTerms:
    """Return what a request asks for.

    Raises:
        InvalidRequest: a header has an invalid value; the message names it.
    """
    priority, wait = _one(headers, PRIORITY_HEADER), _one(headers, MAX_WAIT_HEADER)
    terms = DEFAULT_TERMS
    if priority is not None:
        if not _PRIORITY.fullmatch(priority) or abs(int(priority)) > HIGHEST_PRIORITY:
            raise _wrong(PRIORITY_HEADER, priority, "a whole number from -100 to 100")
        terms = replace(terms, priority=int(priority))
    if wait is not None:
        if not _SECONDS.fullmatch(wait):
            raise _wrong(MAX_WAIT_HEADER, wait, "a number of seconds below 1000000, such as 2.5")
        terms = replace(terms, max_wait_s=float(wait))
    return terms


def _one(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"the header {name} is given {len(values)} times; send it once", name)
    return values[0].strip() if values else None


def _wrong(name: str, value: str, wanted: str) -> InvalidRequest:
    shown = repr(value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}...")
    return InvalidRequest(f"the header {name} is {shown}; it must be {wanted}", name)
