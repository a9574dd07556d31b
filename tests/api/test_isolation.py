"""What keys can find out about each other's requests."""

from __future__ import annotations

import itertools

import pytest
from starlette.datastructures import Headers

from tests.conftest import MakeServer
from vllm_hotswap.access.keys import Keys, KeySource
from vllm_hotswap.access.rights import Group, Rights
from vllm_hotswap.access.roles import Access, Sharing
from vllm_hotswap.config.settings import IsolationConfig


def group(name: str, *keys: str) -> Group:
    return Group(Rights(name), f"rights.{name}", KeySource(Keys.of(keys, name)))


TEAMS = Access(
    user_keys=["eve", "eda"],
    admin_keys=["root"],
    groups=[group("a", "ann", "al"), group("b", "bo")],
)
USERS = Access(user_keys=["eve", "eda"], admin_keys=["root"])


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def salts(access: Access, sharing: Sharing | None, keys: set[str]) -> set[str]:
    accounts = [access.account(Headers(bearer(key))) for key in keys]
    return {access.cache_salt(account, sharing) for account in accounts}


@pytest.mark.parametrize(
    ("access", "sharing", "together"),
    [
        (TEAMS, None, [{"ann", "al"}, {"bo"}, {"eve", "eda"}, {"root"}]),
        (TEAMS, "group", [{"ann", "al"}, {"bo"}, {"eve", "eda"}, {"root"}]),
        (TEAMS, "key", [{"ann"}, {"al"}, {"bo"}, {"eve"}, {"eda"}, {"root"}]),
        (TEAMS, "shared", [{"ann", "al", "bo", "eve", "eda", "root"}]),
        (USERS, None, [{"eve", "eda", "root"}]),
        (USERS, "group", [{"eve", "eda"}, {"root"}]),
        (USERS, "key", [{"eve"}, {"eda"}, {"root"}]),
    ],
)
def test_who_shares_the_prefix_cache(
    access: Access, sharing: Sharing | None, together: list[set[str]]
) -> None:
    """Only keys of one set share the prefix cache."""
    found = [salts(access, sharing, keys) for keys in together]

    assert all(len(of_set) == 1 for of_set in found)
    assert len(found) == len(set(itertools.chain.from_iterable(found)))


def test_the_cache_is_shared_where_there_are_no_keys() -> None:
    assert "" == Access().cache_salt(Access().account(Headers()), None)


@pytest.mark.parametrize("path", ["/metrics", "/admin/status", "/admin/leases", "/admin/events"])
async def test_users_do_not_see_each_others_requests_where_that_is_for_admins(
    make_server: MakeServer, path: str
) -> None:
    """Where requests are visible to admins only, users still see models and health."""
    server = await make_server(access=USERS, isolation=IsolationConfig(observers="admins"))

    async def status(key: str, at: str) -> int:
        return (await server.get(at, headers=bearer(key))).status_code

    assert 403 == await status("eve", path)
    assert 200 == await status("eve", "/v1/models")
    assert 200 == (await server.get("/health")).status_code
    if path != "/admin/events":  # has no end
        assert 200 == await status("root", path)


async def test_users_see_them_unless_something_else_is_said(make_server: MakeServer) -> None:
    server = await make_server(access=USERS)

    assert 200 == (await server.get("/metrics", headers=bearer("eve"))).status_code
