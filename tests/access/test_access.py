"""Which callers may do what."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from vllm_hotswap.access.keys import Keys, KeySource
from vllm_hotswap.access.rights import Group, Rights
from vllm_hotswap.access.roles import Access, Caller, KeyFlags, Role
from vllm_hotswap.api.vllm_routes import vllm_routes
from vllm_hotswap.errors import ConfigError, SwitchNotAllowed, Unauthorized

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
    """Without keys all but switching is open; an admin key opens all that a user key opens."""
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
    """A request without a key gets 401 where keys are configured."""
    with pytest.raises(Unauthorized) as caught:
        access.check(role, bearer(key))

    assert 401 == caught.value.status


@pytest.mark.parametrize(
    ("access", "key", "reason"),
    [
        (CLOSED, None, "switching is closed: start the server with --admin-key"),
        (USER, "user", "or with VLLM_SERVER_DEV_MODE=1 on a trusted network"),
        (ADMIN, None, "send an admin key"),
        (ADMIN, "wrong", "send an admin key"),
        (BOTH, "user", "send an admin key"),
        (BOTH_DEV, "user", "send an admin key"),
    ],
)
def test_caller_who_may_not_switch_is_refused(access: Access, key: str | None, reason: str) -> None:
    """Switching needs an admin key, or dev mode without one; the 403 gives the reason."""
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
    """A key may be sent as `Authorization: Bearer` in any case, or as `x-api-key`."""
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
    """Other schemes do not count; the second header does not replace a wrong bearer key."""
    with pytest.raises(Unauthorized):
        USER.check(Role.USER, Headers(headers))


def lets_in(access: Access, role: Role, key: str) -> bool:
    try:
        access.check(role, bearer(key))
    except (Unauthorized, SwitchNotAllowed):
        return False
    return True


def who_passes(access: Access, role: Role, *keys: str) -> list[str]:
    return [key for key in keys if lets_in(access, role, key)]


def key_file(path: Path, *keys: str) -> Path:
    path.write_text("\n".join(keys))
    path.chmod(0o600)
    return path


def test_environment_gives_keys_and_dev_mode() -> None:
    """The variables of the quickstart and of vLLM are read; each may hold several keys."""
    access = Access.from_environment(
        {
            "VLLM_API_KEY": "user, user2",
            "VLLM_HOTSWAP_ADMIN_KEY": "admin admin2",
            "VLLM_SERVER_DEV_MODE": "1",
        }
    )

    everybody = ("user", "user2", "admin", "admin2", "other", "user, user2")
    assert ["user", "user2", "admin", "admin2"] == who_passes(access, Role.USER, *everybody)
    assert ["admin", "admin2"] == who_passes(access, Role.ADMIN, *everybody)
    assert "<Access user_keys=2 admin_keys=2 dev_mode=True>" == repr(access)


def test_files_give_keys(tmp_path: Path) -> None:
    """Keys from files, which variables name, add to the keys of the other variables."""
    access = Access.from_environment(
        {
            "VLLM_API_KEY": "user",
            "VLLM_HOTSWAP_API_KEY_FILE": str(key_file(tmp_path / "user", "user2", "user3")),
            "VLLM_HOTSWAP_ADMIN_KEY_FILE": str(key_file(tmp_path / "admin", "admin")),
        }
    )

    everybody = ("user", "user2", "user3", "admin", "other")
    assert ["user", "user2", "user3", "admin"] == who_passes(access, Role.USER, *everybody)
    assert ["admin"] == who_passes(access, Role.ADMIN, *everybody)


@pytest.mark.parametrize(
    "environment",
    [{}, {"VLLM_SERVER_DEV_MODE": "0"}, {"VLLM_API_KEY": " , "}, {"VLLM_HOTSWAP_API_KEY_FILE": ""}],
)
def test_nothing_is_open_by_default(environment: dict[str, str]) -> None:
    """An unset, empty or zero variable opens nothing, and an empty key is not a key."""
    access = Access.from_environment(environment, KeyFlags(admin_keys=[""]))

    assert "<Access user_keys=0 admin_keys=0 dev_mode=False>" == repr(access)
    assert [] == who_passes(access, Role.ADMIN, "", "any")


def test_flag_wins_over_the_variable_that_says_the_same(tmp_path: Path) -> None:
    """Keys of a flag replace keys of the variable, and files of a flag replace its files."""
    environment = {
        "VLLM_API_KEY": "old",
        "VLLM_HOTSWAP_ADMIN_KEY": "old",
        "VLLM_HOTSWAP_API_KEY_FILE": "/missing",
        "VLLM_HOTSWAP_ADMIN_KEY_FILE": "/missing",
    }
    flags = KeyFlags(
        admin_keys=["new", "newer"],
        admin_key_files=[key_file(tmp_path / "a", "filed")],
        api_key_files=[key_file(tmp_path / "b", "user2"), key_file(tmp_path / "c", "user3")],
    )
    access = Access.from_environment(environment, flags)

    access.use_user_keys(["user"])

    everybody = ("old", "new", "newer", "filed", "user", "user2", "user3")
    assert list(everybody[1:]) == who_passes(access, Role.USER, *everybody)
    assert ["new", "newer", "filed"] == who_passes(access, Role.ADMIN, *everybody)


@pytest.mark.parametrize("keys", [None, [], [""]])
def test_no_flag_leaves_the_environments_user_key(keys: list[str] | None) -> None:
    """A flag that was not given does not remove the environment's user key."""
    access = Access(user_keys=["user"])

    access.use_user_keys(keys)

    assert ["user"] == who_passes(access, Role.USER, "user", "", "other")


def test_file_that_cannot_be_used_ends_a_start(tmp_path: Path) -> None:
    """The start ends with an error that names the file; a server without its keys would be open."""
    flags = KeyFlags(api_key_files=[tmp_path / "missing"])

    with pytest.raises(ConfigError, match="missing' cannot be read"):
        Access.from_environment({}, flags)


def test_keys_are_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a reload removed keys fail and new ones work; only numbers of keys are reported."""
    path = key_file(tmp_path / "keys", "gone", "stays")
    access = Access(user_key_files=[path], admin_keys=["admin"])

    key_file(path, "stays", "new", "newer")
    with caplog.at_level("INFO"):
        access.read_again()

    assert ["stays", "new", "newer"] == who_passes(
        access, Role.USER, "gone", "stays", "new", "newer"
    )
    assert ["event=keys_read user=3 admin=1"] == caplog.messages


def test_keys_from_before_count_when_a_file_cannot_be_used_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys of both roles stay valid if their file becomes unusable; one log line names the file."""
    users, admins = key_file(tmp_path / "u", "user"), key_file(tmp_path / "a", "admin")
    access = Access(user_key_files=[users], admin_key_files=[admins])

    key_file(users, "new")
    admins.chmod(0o604)
    access.read_again()

    assert ["user", "admin"] == who_passes(access, Role.USER, "user", "admin", "new")
    (message,) = caplog.messages
    assert "event=keys_not_read" in message
    assert str(admins) in message


def test_access_shows_no_key() -> None:
    """No text form of the access rules contains a key."""
    flags = KeyFlags(admin_keys=["sk-canary"])

    assert "canary" not in f"{flags} {Access.from_environment({}, flags)!r}"


def test_dev_mode_opens_none_of_vllms_admin_routes() -> None:
    """Dev mode opens our own routes; profiling and aborting others' requests need an admin key."""
    open_to_all, closed = Access(dev_mode=True), Access(admin_keys=["a"], dev_mode=True)
    admin = Headers({"authorization": "Bearer a"})

    open_to_all.check(Role.ADMIN, Headers())
    closed.check(Role.ADMIN_KEY, admin)
    with pytest.raises(SwitchNotAllowed, match="--admin-key"):
        open_to_all.check(Role.ADMIN_KEY, Headers())
    with pytest.raises(SwitchNotAllowed, match="send an admin key"):
        closed.check(Role.ADMIN_KEY, Headers())
    assert {Role.ADMIN_KEY} == {r.role for r in vllm_routes() if r.path == "/start_profile"}


def test_one_key_in_two_roles_is_refused(tmp_path: Path) -> None:
    """A key in two roles would make users admins; the error names the places, not the key."""
    users, admins = key_file(tmp_path / "u", "user", "both"), key_file(tmp_path / "a", "both")

    with pytest.raises(ConfigError) as refused:
        Access(user_key_files=[users], admin_key_files=[admins])

    message = refused.value.message
    assert f"an admin key (key file '{admins}', line 1)" in message
    assert f"a user key (key file '{users}', line 2)" in message
    assert "both" not in message
    with pytest.raises(ConfigError, match=r"--admin-key or VLLM_HOTSWAP_ADMIN_KEY.*VLLM_API_KEY"):
        Access(["x"], ["x"])


def test_key_of_a_group_that_is_an_admins_is_refused() -> None:
    """A group's key must not be an admin's key, whatever the group's rights are."""
    group = Group(Rights("team"), "rights.team", KeySource(Keys.of(["x"], "rights.team.keys")))

    with pytest.raises(ConfigError, match=r"a user key \(rights.team.keys\)"):
        Access(admin_keys=["x"], groups=[group])


def test_flag_that_makes_an_admin_of_a_user_ends_a_start() -> None:
    """vLLM's flag, known later than the others, must not make an admin's key a user key, too."""
    access = Access(admin_keys=["x"])

    with pytest.raises(ConfigError, match=r"a user key \(--api-key\)"):
        access.use_user_keys(["x"])


def test_keys_from_before_count_when_one_gets_a_second_role(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Earlier keys stay valid; one line in the log gives the reason, and shows no key."""
    users, admins = key_file(tmp_path / "u", "user"), key_file(tmp_path / "a", "sk-admin")
    access = Access(user_key_files=[users], admin_key_files=[admins])

    key_file(users, "user", "sk-admin", "new")
    access.read_again()

    assert ["user", "sk-admin"] == who_passes(access, Role.USER, "user", "sk-admin", "new")
    assert ["sk-admin"] == who_passes(access, Role.ADMIN, "user", "sk-admin", "new")
    (message,) = caplog.messages
    assert "event=keys_not_read" in message
    assert "sk-admin" not in message


def test_caller_is_told_by_role_fingerprint_and_name(tmp_path: Path) -> None:
    """A caller is shown by role, key fingerprint and name; without a known key as anonymous."""
    group = Group(Rights("team"), "rights.team", KeySource(Keys.of(["t"], "rights.team.keys")))
    admins = key_file(tmp_path / "a", "a1  # ann", "a2")
    access = Access(["u"], admin_key_files=[admins], groups=[group])

    callers = [access.caller(bearer(key)) for key in ("a1", "a2", "u", "t", "x", None)]

    assert ["admin", "admin", "user", "user", "anybody", "anybody"] == [c.role for c in callers]
    assert ["", "", "", "team", "", ""] == [c.group for c in callers]
    assert ["ann", "", "", "", "", ""] == [c.name for c in callers]
    assert 4 == len({c.key for c in callers[:4]})
    assert callers[4] == callers[5] == Caller()
    digest = hashlib.sha256(hashlib.sha256(b"a1").digest()).hexdigest()
    assert digest.startswith(callers[0].key)
