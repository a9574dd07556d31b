"""Names of vLLM that moved between versions, and warnings about untested versions."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host.vllm_names import PLACES, find
from vllm_hotswap.host.vllm_versions import READ_ON, RUN_ON, warning
from vllm_hotswap.launch.vllm_config import nearest_architectures, plain_value

TWO_PLACES = {"thing": {"2.0": "away.new.place", "1.0": "away.old"}}
OLD, NEW = object(), object()


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An installed package in which `thing` is in its old place."""
    package, old = ModuleType("away"), ModuleType("away.old")
    package.__path__ = []
    old.thing = OLD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "away", package)
    monkeypatch.setitem(sys.modules, "away.old", old)
    return old


def test_a_name_is_found_in_its_old_place(away: ModuleType) -> None:
    """A name is found in its old place, even if a whole package of the newer place is missing."""
    assert find("thing", TWO_PLACES) is OLD


def test_the_newer_place_wins(away: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer place is used, even if a version still has a module at the old one."""
    new = ModuleType("away.new.place")
    new.thing = NEW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "away.new.place", new)

    assert find("thing", TWO_PLACES) is NEW


def test_a_newer_module_without_the_name_is_passed_over(
    away: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer module without the name is skipped: it may be older than the name's move."""
    monkeypatch.setitem(sys.modules, "away.new.place", ModuleType("away.new.place"))

    assert find("thing", TWO_PLACES) is OLD


def test_a_name_that_is_nowhere_is_an_error_with_all_places(away: ModuleType) -> None:
    """A name that is nowhere gets an error with the name, all places, and what to do."""
    del away.thing

    with pytest.raises(ConfigError, match=r"'thing' in away\.new\.place or away\.old; install"):
        find("thing", TWO_PLACES)


def test_a_module_that_cannot_be_imported_is_not_taken_for_a_missing_one(
    away: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an import inside a module fails, the error names it, and no older place is tried."""
    (tmp_path / "broken_away.py").write_text("import a_library_that_is_missing")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        find("thing", {"thing": {"2.0": "broken_away", "1.0": "away.old"}})


@pytest.mark.parametrize("name", PLACES)
def test_places_are_listed_newest_first(name: str) -> None:
    """Places are listed newest first: a module kept for old callers must not be used."""
    versions = [tuple(map(int, version.split("."))) for version in PLACES[name]]

    assert sorted(versions, reverse=True) == versions


@pytest.mark.parametrize("version", [*RUN_ON, f"{RUN_ON[-1]}.post1", f"{RUN_ON[-1]}rc1+cpu"])
def test_versions_that_were_run_are_passed_without_a_word(version: str) -> None:
    """Versions that were run give no warning, nor do their fix releases and builds."""
    assert warning(version) is None


@pytest.mark.parametrize("version", RUN_ON)
def test_the_page_about_compatibility_says_what_was_run(version: str) -> None:
    """The page lists every version without a warning, with the tests run on it."""
    text = (Path(__file__).parents[2] / "docs/reference/compatibility.md").read_text()

    assert re.search(rf"^\| {re.escape(version)} \| \S.* \| \S.* \| \S.* \|$", text, re.MULTILINE)


@pytest.mark.parametrize("version", READ_ON)
def test_a_version_that_was_only_read_is_warned_of_in_other_words(version: str) -> None:
    """A version that has all names, but was never run, gets another warning."""
    text = warning(version)

    assert text is not None
    assert f"vLLM {version} has every name that vllm-hotswap uses, but was not tested" in text


@pytest.mark.parametrize("version", ["0.1.0", "0.27.0", "0.999.0", "1.0.0", "dev"])
def test_another_version_is_warned_of(version: str) -> None:
    """The warning names another version, and the versions that were run."""
    text = warning(version)

    assert text is not None
    assert version in text
    assert ", ".join(RUN_ON) in text


def test_an_unknown_architecture_is_answered_with_the_nearest_ones() -> None:
    """An unknown architecture gets the nearest ones, not the hundreds that vLLM knows."""
    known = [f"Other{number}Model" for number in range(300)] + ["LlamaForCausalLM"]
    message = (
        "Value error, Model architectures ['LamaForCausalLM', 'Nope'] are not supported for now. "
        f"Supported architectures: dict_keys({known})"
    )

    assert nearest_architectures(message) == (
        "Value error, Model architectures ['LamaForCausalLM', 'Nope'] are not supported for now; "
        "the nearest that are: LlamaForCausalLM"
    )
    assert nearest_architectures(message.replace("LamaForCausalLM", "No")).endswith(
        "['No', 'Nope'] are not supported for now; none has a similar name"
    )


def test_other_messages_of_vllm_stay_what_they_are() -> None:
    """Other messages of vLLM are passed on whole."""
    assert "no [x] here" == nearest_architectures("no [x] here")


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        (
            "Value 64 M cannot be converted to <function human_readable_int at 0x7f0c5a2b3d00>.",
            "'64 M' is not a size; write 64M, or a number of bytes",
        ),
        ("Value {a cannot be converted to <function loads at 0x7f>.", "'{a' is not JSON"),
        ("Value x cannot be converted to <class 'int'>.", "'x' is not a whole number"),
        ("Value x cannot be converted to <function odd at 0x7f>.", "'x' is not a valid odd"),
        ("invalid int value: 'x'", "invalid int value: 'x'"),
    ],
)
def test_a_value_that_vllm_cannot_read_is_told_without_its_function(said: str, plain: str) -> None:
    """A value that vLLM cannot read is reported without its function; other messages stay."""
    assert f"argument --seed: {plain}" == plain_value(f"argument --seed: {said}")
