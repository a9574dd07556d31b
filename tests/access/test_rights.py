"""What a request may ask for, and what counts of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.datastructures import Headers

from vllm_hotswap.access.keys import Keys, KeySource
from vllm_hotswap.access.rights import ADMIN, Group, Rights, read_members, read_terms
from vllm_hotswap.access.roles import Access
from vllm_hotswap.errors import ConfigError, InvalidRequest
from vllm_hotswap.scheduling.scheduler import RequestTerms

PRIORITY, MAX_WAIT = "x-hotswap-priority", "x-hotswap-max-wait"


def group(name: str, *keys: str, **rights: object) -> Group:
    place = f"rights.{name}"
    return Group(Rights(name, **rights), place, KeySource(Keys.of(keys, place)))  # type: ignore[arg-type]


def bearer(key: str | None, **more: str) -> Headers:
    own = {} if key is None else {"authorization": f"Bearer {key}"}
    return Headers({**own, **{name.replace("_", "-"): value for name, value in more.items()}})


# --- what a request asks for ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "priority", "wait_s"),
    [
        ({}, None, None),
        ({PRIORITY: "7"}, 7, None),
        ({PRIORITY: " -100 "}, -100, None),
        ({PRIORITY: "+3", MAX_WAIT: "0"}, 3, 0.0),
        ({MAX_WAIT: "2.5"}, None, 2.5),
        ({"X-Hotswap-Max-Wait": "12"}, None, 12.0),
    ],
)
def test_request_asks_with_headers(
    headers: dict[str, str], priority: int | None, wait_s: float | None
) -> None:
    """A request asks by headers for a priority, for a maximum wait, for both, or for nothing."""
    assert RequestTerms(priority, wait_s) == read_terms(Headers(headers))


@pytest.mark.parametrize(
    "value", ["", "high", "1.0", "101", "-101", "1,2", "\xb9", "1e1", "0x1", "7" * 99]
)
def test_priority_that_is_none_is_refused(value: str) -> None:
    """A wrong priority gets 400 with the header's name; a long value is not repeated whole."""
    with pytest.raises(InvalidRequest, match=f"the header {PRIORITY} is '") as caught:
        read_terms(Headers(raw=[(PRIORITY.encode(), value.encode("latin-1"))]))

    assert (400, PRIORITY) == (caught.value.status, caught.value.param)
    assert len(caught.value.message) < 150


@pytest.mark.parametrize(
    "value", ["", "soon", "-1", "nan", "inf", "1e3", "1_0", ".5", "1.", "9" * 10]
)
def test_wait_that_is_none_is_refused(value: str) -> None:
    """A wait that is negative or without an end is refused."""
    with pytest.raises(InvalidRequest, match=f"the header {MAX_WAIT} is '") as caught:
        read_terms(Headers({MAX_WAIT: value}))

    assert MAX_WAIT == caught.value.param


def test_header_that_is_given_twice_is_refused() -> None:
    """A header that is given twice is refused, because either could be meant."""
    twice = [(PRIORITY.encode(), b"1"), (PRIORITY.encode(), b"2")]

    with pytest.raises(InvalidRequest, match="given 2 times"):
        read_terms(Headers(raw=twice))


# --- what counts of it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "own", "counts"),
    [(None, 0, None), (3, 0, 3), (5, 0, 5), (6, 0, 5), (-100, 0, -100), (9, 8, 8), (6, 8, 6)],
)
def test_priority_is_bounded_by_the_group(asked: int | None, own: int, counts: int | None) -> None:
    """A group limits priority, but not below its model's own: asking for more never gives less."""
    assert (
        counts
        == Rights(max_priority=5).bound(RequestTerms(asked), "llama", RequestTerms(own)).priority
    )


@pytest.mark.parametrize(("asked", "counts"), [(None, None), (0.0, 2.0), (2.0, 2.0), (9.0, 9.0)])
def test_wait_is_bounded_by_the_group(asked: float | None, counts: float | None) -> None:
    """A group raises a requested wait to its minimum; a request without one is unchanged."""
    terms = Rights(min_max_wait_s=2.0).bound(RequestTerms(max_wait_s=asked), "llama")

    assert counts == terms.max_wait_s


@pytest.mark.parametrize(
    ("switch_to", "allowed"),
    [(None, ["llama", "qwen"]), (frozenset(["qwen"]), ["qwen"]), (frozenset[str](), [])],
)
def test_group_says_to_which_models_its_requests_may_switch(
    switch_to: frozenset[str] | None, allowed: list[str]
) -> None:
    """A group may let its requests switch to all, some or no models; the rule is named."""
    rights = Rights("team", switch_to)
    terms = {alias: rights.bound(RequestTerms(), alias) for alias in ("llama", "qwen")}

    assert allowed == [alias for alias, bound in terms.items() if bound.may_switch]
    assert {"rights.team.switch_to"} == {bound.rule for bound in terms.values()}


# --- groups -----------------------------------------------------------------------------------


def test_key_has_the_rights_of_its_group() -> None:
    """Keys have their group's rights, admins all; other keys, or none, have `default`'s."""
    access = Access(
        user_keys=["user"],
        admin_keys=["admin"],
        groups=[group("team", "one", "two"), group("default", max_priority=1), group("jobs", "x")],
    )
    callers = ["one", "two", "x", "user", "admin"]

    names = {key: access.rights(bearer(key)).group for key in callers}

    assert ["team", "team", "jobs", "default", "admin"] == list(names.values())
    assert 1 == access.rights(bearer("user")).max_priority
    assert ADMIN is access.rights(bearer("admin"))
    assert "default" == Access().rights(bearer(None)).group


def test_terms_are_those_of_the_callers_group() -> None:
    """A request's terms are limited by its caller's group; an admin's are not limited."""
    access = Access(
        admin_keys=["admin"],
        groups=[
            group("team", "key", max_priority=5, switch_to=frozenset(["qwen"]), min_max_wait_s=2.0)
        ],
    )
    asked = {PRIORITY: "90", MAX_WAIT: "0.5"}

    terms = [access.terms(bearer(key, **asked), "llama") for key in ("key", "admin", "other")]

    assert [(5, 2.0, False), (90, 0.5, True), (0, 5.0, True)] == [
        (each.priority, each.max_wait_s, each.may_switch) for each in terms
    ]


def test_rights_of_everybody_else_count_without_any_key() -> None:
    """A server without keys can forbid that requests cause a switch."""
    access = Access(groups=[group("default", switch_to=frozenset())])

    assert not access.terms(bearer(None), "llama").may_switch
    assert Access().terms(bearer(None), "llama").may_switch


def test_key_of_a_group_is_a_user_key() -> None:
    """A group's key is a user key, so a server with only such keys requires one."""
    access = Access(groups=[group("team", "one")])

    assert "<Access user_keys=1 admin_keys=0 dev_mode=False>" == repr(access)


def test_key_of_two_groups_is_refused_without_being_shown() -> None:
    """A key of two groups is refused without showing it; both places are named."""
    groups = [group("a", "sk-1"), group("b", "sk-2"), group("c", "sk-3", "sk-1")]

    with pytest.raises(
        ConfigError, match=r"^rights\.c: .* rights\.a; a key may be in one group only"
    ) as caught:
        read_members(groups)

    assert "sk-" not in caught.value.message


def test_key_file_of_a_group_is_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A key file is reloaded whole or not at all: a key in two groups changes nothing."""
    path = tmp_path / "keys"
    path.write_text("old\n")
    path.chmod(0o600)
    filed = Group(Rights("team"), "rights.team", KeySource(files=[path]))
    access = Access(groups=[group("jobs", "job"), filed])
    assert access.has_files

    path.write_text("new\n")
    access.read_again()
    path.write_text("job\n")
    access.read_again()

    names = {key: access.rights(bearer(key)).group for key in ("old", "new", "job")}
    assert {"old": "default", "new": "team", "job": "jobs"} == names
    assert "event=keys_not_read" in caplog.text


def test_nobody_waits_longer_for_having_asked_for_less() -> None:
    """A group's minimum never makes a request wait longer than its model's default."""
    own = RequestTerms(max_wait_s=2.0)
    assert (
        2.0
        == Rights(min_max_wait_s=5.0).bound(RequestTerms(max_wait_s=1.0), "llama", own).max_wait_s
    )
