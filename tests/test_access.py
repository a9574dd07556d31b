"""Who may call what."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from vllm_hotswap.access import Access, Role
from vllm_hotswap.errors import SwitchNotAllowed, Unauthorized

CLOSED = Access()
DEV = Access(dev_mode=True)
USER = Access(user_keys=("user", "user2"))
ADMIN = Access(admin_keys=("admin",))
BOTH = Access(user_keys=("user",), admin_keys=("admin", "admin2"))
BOTH_DEV = Access(user_keys=("user",), admin_keys=("admin",), dev_mode=True)
USER_DEV = Access(user_keys=("user",), dev_mode=True)


def bearer(key: str | None) -> Headers:
    return Headers({} if key is None else {"authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    ("access", "role", "key"),
    [
        (CLOSED, Role.PUBLIC, None),
        (CLOSED, Role.USER, None),
        (DEV, Role.ADMIN, None),
        (USER, Role.PUBLIC, None),
        (USER, Role.PUBLIC, "wrong"),
        (USER, Role.USER, "user"),
        (USER, Role.USER, "user2"),
        (USER_DEV, Role.ADMIN, "user"),
        (ADMIN, Role.USER, None),
        (ADMIN, Role.ADMIN, "admin"),
        (BOTH, Role.USER, "user"),
        (BOTH, Role.USER, "admin"),
        (BOTH, Role.ADMIN, "admin2"),
        (BOTH_DEV, Role.ADMIN, "admin"),
    ],
)
def test_caller_passes(access: Access, role: Role, key: str | None) -> None:
    """Without keys everything but switching is open; an admin key opens what a user key opens."""
    access.check(role, bearer(key))


@pytest.mark.parametrize(
    ("access", "role", "key"),
    [
        (USER, Role.USER, None),
        (USER, Role.USER, ""),
        (USER, Role.USER, "wrong"),
        (USER, Role.USER, "use"),
        (USER, Role.ADMIN, None),
        (USER_DEV, Role.ADMIN, None),
        (BOTH, Role.USER, None),
        (BOTH, Role.ADMIN, "wrong"),
    ],
)
def test_caller_without_a_key_is_refused(access: Access, role: Role, key: str | None) -> None:
    """Where keys are configured, one of them must be sent (401)."""
    with pytest.raises(Unauthorized) as caught:
        access.check(role, bearer(key))

    assert 401 == caught.value.status


@pytest.mark.parametrize(
    ("access", "key", "reason"),
    [
        (CLOSED, None, "switching is closed: start the server with --admin-key"),
        (USER, "user", "or with VLLM_SERVER_DEV_MODE=1 on a trusted network"),
        (ADMIN, None, "needs an admin key"),
        (ADMIN, "wrong", "needs an admin key"),
        (BOTH, "user", "needs an admin key"),
        (BOTH_DEV, "user", "needs an admin key"),
    ],
)
def test_caller_who_may_not_switch_is_refused(access: Access, key: str | None, reason: str) -> None:
    """Switching needs an admin key, or dev mode where there is none; the reason is told (403)."""
    with pytest.raises(SwitchNotAllowed, match=reason) as caught:
        access.check(Role.ADMIN, bearer(key))

    assert 403 == caught.value.status


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer user"},
        {"authorization": "bearer   user "},
        {"x-api-key": "user"},
        {"authorization": "Basic abc", "x-api-key": "user"},
    ],
)
def test_key_may_be_sent_in_openais_and_in_anthropics_header(headers: dict[str, str]) -> None:
    """`Authorization: Bearer` in any case, or `x-api-key`."""
    USER.check(Role.USER, Headers(headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "user"},
        {"authorization": "Basic user"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \xe9"},
        {"authorization": "Bearer wrong", "x-api-key": "user"},
    ],
)
def test_key_in_another_form_is_none(headers: dict[str, str]) -> None:
    """Other schemes do not count, and a wrong bearer key is not made good by another header."""
    with pytest.raises(Unauthorized):
        USER.check(Role.USER, Headers(headers))


def test_environment_gives_keys_and_dev_mode() -> None:
    """The quickstart's and vLLM's variables are read."""
    environment = {
        "VLLM_API_KEY": "user",
        "VLLM_HOTSWAP_ADMIN_KEY": "admin",
        "VLLM_SERVER_DEV_MODE": "1",
    }

    assert Access(("user",), ("admin",), dev_mode=True) == Access.from_environment(environment, [])


@pytest.mark.parametrize("environment", [{}, {"VLLM_SERVER_DEV_MODE": "0"}, {"VLLM_API_KEY": ""}])
def test_nothing_is_open_by_default(environment: dict[str, str]) -> None:
    """Neither unset nor empty nor zero opens anything, and an empty key is no key."""
    assert Access() == Access.from_environment(environment, [""])


def test_flags_win_over_the_environment() -> None:
    """Keys that are given as flags replace those of the environment."""
    environment = {"VLLM_API_KEY": "old", "VLLM_HOTSWAP_ADMIN_KEY": "old"}

    access = Access.from_environment(environment, ["new", "newer"]).with_user_keys(["user"])

    assert Access(("user",), ("new", "newer")) == access


@pytest.mark.parametrize("keys", [None, [], [""]])
def test_no_flag_leaves_the_environments_user_key(keys: list[str] | None) -> None:
    """A flag that was not given takes nothing away."""
    assert USER is USER.with_user_keys(keys)
