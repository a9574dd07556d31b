"""Who may call what: keys, roles, and whether switching is open.

`--api-key` (or `VLLM_API_KEY`) is the user key. `--admin-key` (or `VLLM_HOTSWAP_ADMIN_KEY`) is
the admin key; it may do what the user key may, too. Without an admin key, the quickstart's
`VLLM_SERVER_DEV_MODE=1` opens switching to whoever may use the server, and nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from starlette.datastructures import Headers

from vllm_hotswap.errors import SwitchNotAllowed, Unauthorized


class Role(Enum):
    """What a route asks of its caller."""

    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Access:
    """The keys of a server. Empty tuples: no key is asked for."""

    user_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    dev_mode: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], admin_keys: Iterable[str]) -> Access:
        """Flags win over the environment; empty keys count as none."""
        user = _given([environment.get("VLLM_API_KEY", "")])
        admin = _given(admin_keys) or _given([environment.get("VLLM_HOTSWAP_ADMIN_KEY", "")])
        return cls(user, admin, _is_on(environment.get("VLLM_SERVER_DEV_MODE", "")))

    def with_user_keys(self, keys: Iterable[str] | None) -> Access:
        """The same with the keys of `--api-key`, where there are any."""
        given = _given(keys or ())
        return replace(self, user_keys=given) if given else self

    def check(self, role: Role, headers: Headers) -> None:
        """Let the caller pass.

        Raises:
            Unauthorized: no valid key was sent.
            SwitchNotAllowed: the key is no admin key, or nobody may change state.
        """
        if role is Role.PUBLIC:
            return
        key = _key(headers)
        is_admin = _matches(key, self.admin_keys)
        if self.user_keys and not is_admin and not _matches(key, self.user_keys):
            raise Unauthorized("a valid API key is needed; send Authorization: Bearer <key>")
        if role is Role.ADMIN and not is_admin:
            self._check_admin()

    def _check_admin(self) -> None:
        if self.admin_keys:
            raise SwitchNotAllowed("this route changes the server's state and needs an admin key")
        if not self.dev_mode:
            raise SwitchNotAllowed(
                "switching is closed: start the server with --admin-key (or "
                "VLLM_HOTSWAP_ADMIN_KEY), or with VLLM_SERVER_DEV_MODE=1 on a trusted network"
            )


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _given(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if key)


def _key(headers: Headers) -> bytes:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip().encode()
    return headers.get("x-api-key", "").encode()


def _matches(key: bytes, known: Iterable[str]) -> bool:
    """Compares with every key, in constant time each."""
    matches = [secrets.compare_digest(key, other.encode()) for other in known]
    return any(matches)
