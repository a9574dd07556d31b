"""Access to routes: roles, the keys that they need, and whether switching is open.

`--api-key` (vLLM's flag) gives user keys, `--admin-key` admin keys; each has a variable and a file,
too. An admin may do what a user may. Without an admin key, the quickstart's
`VLLM_SERVER_DEV_MODE=1` opens our own routes that change state to every caller that may use the
server. It opens none of vLLM's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Literal

from vllm_hotswap.access.keys import Key, Keys, KeySource, split_keys
from vllm_hotswap.access.rights import (
    ADMIN,
    DEFAULT,
    EVERYBODY,
    Account,
    Group,
    Headers,
    Rights,
    read_members,
    read_terms,
)
from vllm_hotswap.errors import ConfigError, SwitchNotAllowed, Unauthorized
from vllm_hotswap.scheduling import DEFAULT_TERMS, RequestTerms

log = logging.getLogger("vllm_hotswap")

HOW_TO_OPEN = (
    "start the server with --admin-key (or VLLM_HOTSWAP_ADMIN_KEY), or with "
    "VLLM_SERVER_DEV_MODE=1 on a trusted network"
)


class Role(Enum):
    """The role that a route requires of its caller."""

    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"
    ADMIN_KEY = "admin key"
    """A caller with an admin key; `VLLM_SERVER_DEV_MODE` is not enough."""


@dataclass(frozen=True, slots=True)
class KeyFlags:
    """Keys given on the command line, besides vLLM's `--api-key`."""

    admin_keys: Sequence[str] = field(default=(), repr=False)
    admin_key_files: Sequence[Path] = ()
    api_key_files: Sequence[Path] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request, as the audit log and events record it."""

    role: Literal["admin", "user", "anybody"] = "anybody"
    """`anybody`: no known key was sent."""
    group: str = ""
    """The caller's group in `rights`; empty without one."""
    key: str = ""
    """The fingerprint of the key; empty without one."""
    name: str = ""
    """The name of the key in its file."""


class Access:
    """The keys of a server, and the decision about a caller.

    The mutable state is where user keys come from, and the keys of both roles and of every group as
    they were last read. `use_user_keys` and `read_again` change all of them at once, or none.
    A role without keys requires none. Keys of groups are user keys.
    """

    def __init__(
        self,
        user_keys: Iterable[str] = (),
        admin_keys: Iterable[str] = (),
        dev_mode: bool = False,
        user_key_files: Sequence[Path] = (),
        admin_key_files: Sequence[Path] = (),
        groups: Iterable[Group] = (),
    ) -> None:
        """Read all keys.

        Raises:
            ConfigError: a file cannot be used, or a key is in two groups or roles.
        """
        self._dev_mode = dev_mode
        rights = {group.rights.group: group for group in groups}
        self._others = rights.pop(DEFAULT).rights if DEFAULT in rights else Rights()
        self._groups = tuple(rights.values())
        users = Keys.of(user_keys, "--api-key or VLLM_API_KEY")
        admins = Keys.of(admin_keys, "--admin-key or VLLM_HOTSWAP_ADMIN_KEY")
        self._user_source = KeySource(users, user_key_files)
        self._admin_source = KeySource(admins, admin_key_files)
        self._read()

    def __repr__(self) -> str:
        return (
            f"<Access user_keys={len(self._user)} admin_keys={len(self._admin)} "
            f"dev_mode={self._dev_mode}>"
        )

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str],
        flags: KeyFlags | None = None,
        groups: Iterable[Group] = (),
    ) -> Access:
        """Make it from flags and variables: a flag replaces its variable; keys and files add up."""
        flags = flags or KeyFlags()
        return cls(
            split_keys(environment.get("VLLM_API_KEY", "")),
            _given(flags.admin_keys) or split_keys(environment.get("VLLM_HOTSWAP_ADMIN_KEY", "")),
            _is_on(environment.get("VLLM_SERVER_DEV_MODE", "")),
            flags.api_key_files or _paths(environment.get("VLLM_HOTSWAP_API_KEY_FILE")),
            flags.admin_key_files or _paths(environment.get("VLLM_HOTSWAP_ADMIN_KEY_FILE")),
            groups,
        )

    def use_user_keys(self, keys: Iterable[str] | None) -> None:
        """Replace the user keys of the variable by those of `--api-key`, if there are any."""
        if given := Keys.of(keys or (), "--api-key"):
            self._user_source = replace(self._user_source, given=given)
            self._read()

    @property
    def has_files(self) -> bool:
        sources = [self._user_source, self._admin_source, *(g.source for g in self._groups)]
        return any(source.files for source in sources)

    @property
    def has_keys(self) -> bool:
        """Whether any route requires a key."""
        return bool(self._user or self._admin)

    @property
    def is_switching_closed(self) -> bool:
        """Whether our own routes that change state refuse every caller."""
        return not (self._admin or self._dev_mode)

    def read_again(self) -> None:
        """Read the key files again; keep the previous keys if that fails."""
        try:
            self._read()
        except ConfigError as error:
            log.error("event=keys_not_read cause=%r then='the previous keys are kept'", str(error))
        else:
            log.info("event=keys_read user=%d admin=%d", len(self._user), len(self._admin))

    def _read(self) -> None:
        users, admins = self._user_source.read(), self._admin_source.read()
        members = read_members(self._groups)
        users = sum((keys for _, keys in members), users)
        _refuse_two_roles(users, admins)
        self._user, self._admin, self._members = users, admins, members

    def check(self, role: Role, headers: Headers) -> None:
        """Check that the caller may use a route.

        Raises:
            Unauthorized: no valid key was sent.
            SwitchNotAllowed: the key is not an admin key, or switching is closed.
        """
        if role is Role.PUBLIC:
            return
        key = _key(headers)
        is_user, is_admin = self._user.know(key), self._admin.know(key)
        if self._user and not (is_user or is_admin):
            raise Unauthorized("a valid API key is required; send Authorization: Bearer <key>")
        if role in (Role.ADMIN, Role.ADMIN_KEY) and not is_admin:
            self._check_admin(role)

    def is_admin(self, headers: Headers) -> bool:
        """Whether an admin key was sent; never, where there are none."""
        return self._admin.know(_key(headers))

    def rights(self, headers: Headers) -> Rights:
        """Return the rights of an authenticated caller."""
        _, rights = self._find(headers)
        return rights

    def mark(self, headers: Headers) -> str | None:
        """Return the fingerprint of the caller's key; None without a known key."""
        key, _ = self._find(headers)
        return None if key is None else key.fingerprint

    def caller(self, headers: Headers) -> Caller:
        """Return the caller of a request, whether it passes `check` or not."""
        key, rights = self._find(headers)
        if key is None:
            return Caller()
        if rights is ADMIN:
            return Caller("admin", "", key.fingerprint, key.name)
        group = "" if rights is self._others else rights.group
        return Caller("user", group, key.fingerprint, key.name)

    def account(self, headers: Headers) -> Account:
        """Return the account whose limits apply to an authenticated caller."""
        if not self.has_keys:
            return EVERYBODY if self._others == Rights() else self._account("", "", self._others)
        key, rights = self._find(headers)
        if key is None:
            return self._account("", "", rights)
        mark = key.fingerprint
        if rights is ADMIN:
            return Account("admin", mark, is_admin=True, group=ADMIN.group)
        if rights.group != DEFAULT:
            return self._account(f"group {rights.group}", mark, rights)
        return self._account(f"key {mark}", mark, rights)

    def _find(self, headers: Headers) -> tuple[Key | None, Rights]:
        """Return the key that was sent, if it is known, and the rights that come with it."""
        sent = _key(headers)
        if (key := self._admin.find(sent)) is not None:
            return key, ADMIN
        if (key := self._user.find(sent)) is None:  # keys of groups are user keys
            return None, self._others
        of_groups = (rights for rights, keys in self._members if keys.know(sent))
        return key, next(of_groups, self._others)

    def _account(self, name: str, key: str, rights: Rights) -> Account:
        return Account(
            name, key, is_bounded=self.has_keys, per_minute=rights.per_minute, group=rights.group
        )

    def cache_salt(self, account: Account, sharing: Sharing | None) -> str:
        """Return the prefix-cache salt of an account; empty where all accounts share the cache."""
        if sharing == "key":
            return f"key {account.key}"
        if sharing == "group" or (sharing is None and self._members):
            # The prefix keeps a group named "admin" apart from admins.
            return f"group {account.group}" if not account.is_admin else "admin"
        return ""

    def terms(
        self, headers: Headers, alias: str, own: RequestTerms = DEFAULT_TERMS
    ) -> RequestTerms:
        """Return the request's terms, limited by its rights. Raises `InvalidRequest`."""
        asked = read_terms(headers)
        if asked is DEFAULT_TERMS and self._others.switch_to is None and not self._members:
            return DEFAULT_TERMS
        return self.rights(headers).bound(asked, alias, own)

    def _check_admin(self, role: Role) -> None:
        if self._admin:
            raise SwitchNotAllowed("this route is for admins: send an admin key")
        if role is Role.ADMIN_KEY:
            raise SwitchNotAllowed(
                "this route is for admins: start the server with --admin-key (or "
                "VLLM_HOTSWAP_ADMIN_KEY), and send that key"
            )
        if not self._dev_mode:
            raise SwitchNotAllowed(f"switching is closed: {HOW_TO_OPEN}")


def _refuse_two_roles(users: Keys, admins: Keys) -> None:
    """Refuse a key that is both a user's and an admin's. Raises `ConfigError`."""
    if (both := users.shared(admins)) is not None:
        user, admin = both
        raise ConfigError(
            f"one key is an admin key ({admin.place}) and also a user key ({user.place}), which "
            "would make users admins; remove it from one of them (admins may do all that users "
            "may)"
        )


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _given(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key]


def _paths(name: str | None) -> list[Path]:
    return [Path(name)] if name else []


def _key(headers: Headers) -> bytes:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip().encode()
    return headers.get("x-api-key", "").encode()


Sharing = Literal["shared", "group", "key"]
