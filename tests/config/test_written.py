"""YAML as it was written: no value changes on its way, and every error has a place."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from vllm_hotswap.config.written import (
    MAX_DEPTH,
    MAX_VALUES,
    OddKey,
    Surprising,
    WrittenFloat,
    WrittenInt,
    read_scalar,
    read_yaml,
    surprises,
)
from vllm_hotswap.errors import ConfigError

PATH = Path("models.yaml")

CONTROL = "is not valid YAML: the control character"


def read(text: str) -> Any:
    return read_yaml(text, PATH)[0]


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return caught.value.message


# --- scalars ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("0", 0),
        ("-12", -12),
        ("+5", 5),
        ("0x1F", 31),
        ("1.10", 1.1),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        ("1.0e+10", 1e10),
        ("01.5", 1.5),
    ],
)
def test_a_scalar_that_all_versions_of_yaml_read_alike_is_that(text: str, value: object) -> None:
    """Numbers, booleans and null that all versions of YAML agree on stay so; `1e3` is a number."""
    read = read_scalar(text)

    assert value == read
    assert isinstance(read, type(value))


@pytest.mark.parametrize("text", ["1.10", "1.0", "+5", "0x1F", "1e3", "-0.50", "10000000000000000"])
def test_a_number_is_shown_as_it_was_written(text: str) -> None:
    """A number as text is as it was written, even in copies; as JSON it is an ordinary number."""
    number = read_scalar(text)
    copies = [number, copy.deepcopy(number), pickle.loads(pickle.dumps(number))]  # noqa: S301

    assert [text] * 3 == [str(one) for one in copies]
    assert [text] * 2 == [repr(number), f"{number}"]
    assert json.loads(json.dumps(number)) == number


def test_a_written_number_without_a_text_has_the_usual_one() -> None:
    """A written number that was made without a text has the usual one."""
    assert ["7", "0.1"] == [str(WrittenInt(7)), str(WrittenFloat(0.1))]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0512", 330),
        ("-017", -15),
        ("0812", 812),
        ("0o17", 15),
        ("0b101", 5),
        ("1_000", 1000),
        ("1_0.5", 10.5),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("-1:30.5", -90.5),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("1e999", float("inf")),
        ("yes", True),
        ("No", False),
        ("ON", True),
        ("off", False),
    ],
)
def test_a_scalar_that_versions_of_yaml_read_otherwise_is_surprising(
    text: str, value: object
) -> None:
    """A scalar that YAML versions read differently is kept as text and as YAML's value."""
    found = read_scalar(text)

    assert Surprising(text, value) == found  # type: ignore[arg-type]
    assert text == str(found)
    assert repr(found).startswith(f"{text}, which YAML reads as ")
    assert bool(value) == bool(found)


def test_not_a_number_is_surprising() -> None:
    """Not-a-number is surprising, because it equals nothing."""
    assert ".nan, which YAML reads as nan" == repr(read_scalar(".nan"))


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-01",
        "2024-01-01 10:00:00",
        "=",
        "<<",
        "0b9",
        "1:99",
        "1.2.3",
        "127.0.0.1:80",
        "yEs",
        "y",
        "n",
        "nan",
        "inf",
        "_1",
        "9" * 101,
        "llama",
    ],
)
def test_everything_else_is_a_text(text: str) -> None:
    """Everything else is text, dates too, which YAML 1.1 would turn into objects."""
    assert text == read_scalar(text)
    assert isinstance(read_scalar(text), str)


@pytest.mark.parametrize("text", ["'0512'", '"0512"', "!!str 0512", "|-\n  0512"])
def test_quotes_make_a_text(text: str) -> None:
    """Quotes make a text, and so does the tag for it."""
    assert {"a": "0512"} == read(f"a: {text}")


@pytest.mark.parametrize(
    ("text", "value"),
    [("!!int 7", 7), ("!!float 1.5", 1.5), ("!!bool true", True), ("!!null ''", None)],
)
def test_a_tag_is_kept_to(text: str, value: object) -> None:
    """A correct tag is obeyed."""
    assert {"a": value} == read(f"a: {text}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("!!int 0512", "the value tagged !!int does not fit the tag"),
        ("!!int x", "the value tagged !!int does not fit the tag"),
        ("!!bool yes", "the value tagged !!bool does not fit the tag"),
        ("!!float true", "the value tagged !!float does not fit the tag"),
        ("!!binary aGk=", "could not determine a constructor for the tag"),
        ("!!timestamp 2024-01-01", "could not determine a constructor for the tag"),
        ("!!set {a}", "could not determine a constructor for the tag"),
        ("!mine x", "could not determine a constructor for the tag"),
    ],
)
def test_a_tag_that_is_wrong_or_not_known_is_refused(text: str, problem: str) -> None:
    """A wrong or unknown tag is refused with its line."""
    message = refusal(f"\na: {text}")

    assert message.startswith("models.yaml:2: is not valid YAML: ")
    assert problem in message


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("!!seq a", "seq"),
        ("!!map a", "map"),
        ("!!map [a]", "map"),
        ("!!seq {a: b}", "seq"),
        ("!!int {a: b}", "int"),
        ("!!null []", "null"),
        ("!!str [a]", "str"),
        ("!!str {a: b}", "str"),
        ("!!merge [a]", "merge"),
        ("!!plain [a]", "plain"),
        ("{<<: !!str {a: b}}", "str"),
        ("{<<: !!int [{a: b}]}", "int"),
        ("{? !!merge [a] : {b: c}}", "merge"),
    ],
)
def test_a_tag_of_another_kind_of_value_is_refused(text: str, tag: str) -> None:
    """A tag for another kind of value is refused with the value's place, as text for a list."""
    message = refusal(f"\na: {text}")

    assert message.startswith("models.yaml:2: is not valid YAML: ")
    assert f"the value tagged !!{tag} does not fit the tag, column " in message


@pytest.mark.parametrize(
    "text", [r'a: "\UFFFFFFFF"', r'a: "\U00110000"', f"%YAML 1.{'9' * 5000}\n---\na: b"]
)
def test_a_number_that_yaml_cannot_hold_is_refused(text: str) -> None:
    """A character beyond Unicode or a version of thousands of digits is refused."""
    assert refusal(text).startswith("models.yaml:1: is not valid YAML: ")


def test_surprises_are_found_wherever_they_are() -> None:
    """Surprises are found in lists and mappings, with their path."""
    value = read("a: [1, {b: 0512}]\nc: no")

    assert [(("a", 1, "b"), "0512"), (("c",), "no")] == [
        (keys, item.text) for keys, item in surprises(value)
    ]


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("yes", "yes, which YAML reads as true"),
        ("1:30", "1:30, which YAML reads as 90"),
        ("0512", "0512, which YAML reads as 330"),
        ("1.10", "1.10, which YAML reads as 1.1"),
        ("~", "~, which YAML reads as null"),
        ("7", "7"),
    ],
)
def test_a_key_stays_what_was_written(key: str, shown: str) -> None:
    """A key stays as written, and has YAML's value if that is not text."""
    (found,) = read(f"{key}: x")

    assert key == found
    assert isinstance(found, OddKey)
    assert shown == repr(found)


def test_a_key_in_quotes_is_a_text() -> None:
    """A key in quotes is a text, as any value."""
    assert [str, str] == [type(key) for key in read("'yes': 1\nplain: 2")]


def test_merged_keys_are_replaced_by_own_ones_wherever_they_stand() -> None:
    """A merge is replaced by own keys wherever they stand, in nested and listed merges too."""
    text = "a: &a {x: 1, y: 1}\nb: &b {x: 2, <<: *a}\nc: {<<: [*b, *a], z: 3}\n"

    assert {"x": 2, "y": 1, "z": 3} == read(text)["c"]


# --- places -------------------------------------------------------------------------------------


def test_every_key_and_every_item_has_its_line() -> None:
    """Every key and item has its line; a merged key has that of its source."""
    text = (
        "models:\n  a: &a\n    seed: 1\n    list:\n    - x\n    - y\n  b:\n    <<: *a\n    z: 2\n"
    )
    _, source = read_yaml(text, PATH)

    assert [1, 3, 6, 3, 9] == [
        source.line("models"),
        source.line("models", "a", "seed"),
        source.line("models", "a", "list", 1),
        source.line("models", "b", "seed"),
        source.line("models", "b", "z"),
    ]


def test_what_is_not_there_has_the_line_of_what_is_around_it() -> None:
    """A missing value has the line of its surroundings, or None if there are none."""
    _, source = read_yaml("models:\n  a: {seed: 1}\n", PATH)

    assert "models.yaml:2: models.a.model" == str(source.place("models", "a", "model"))
    assert "models.yaml: switching" == str(source.place("switching"))
    assert "models.yaml" == str(source.place())


# --- files that cannot be read ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:\n  b: \x1b[0m", f"models.yaml:2: {CONTROL} U+001B is in column 6"),
        ("\x00", f"models.yaml:1: {CONTROL} U+0000 is in column 1"),
        ("a: [", "models.yaml:1: is not valid YAML: expected the node content"),
        ("a: b\n\tc: d", "models.yaml:2: is not valid YAML: found character"),
        ("a: 1\nb: {c: 1,\n c: 2}", "models.yaml:3: is not valid YAML: key 'c' is given twice"),
        ("yes: 1\n'yes': 2", "models.yaml:2: is not valid YAML: key 'yes' is given twice"),
        ("a: &a {b: {c: *a}}", "models.yaml:1: is not valid YAML: the alias *a is inside &a"),
        ("a: &a\n- *a", "models.yaml:2: is not valid YAML: the alias *a is inside &a"),
        ("a: &a {<<: *a}", "models.yaml:1: is not valid YAML: the alias *a is inside &a"),
        ("a: *b", "models.yaml:1: is not valid YAML: found undefined alias 'b'"),
        ("? {a: 1}\n: 2", "models.yaml:1: is not valid YAML: a key must be a scalar"),
        ("a: {<<: 3}", "models.yaml:1: is not valid YAML: expected a mapping or list of mappings"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_its_place(text: str, expected: str) -> None:
    """An unreadable file gives the place of the error on one line, and none of its content."""
    message = refusal(text)

    assert message.startswith(expected)
    assert "\n" not in message


def test_all_that_can_be_told_of_a_text_is_told_at_once() -> None:
    """All errors of a text are reported in order; keys of an unclosed mapping are not compared."""
    twice = "a: 1\na: 2\nb: {c: 1, c: 2}\nd: !!int [1]\n"
    tagged = "a: !!int x\nb: !mine 3\nc: !!bool 7\n"

    assert [2, 3, 4] == lines_of(refusal(twice))
    assert [3, 4, 5] == lines_of(refusal(twice + "e: ["))
    assert [1, 2, 3] == lines_of(refusal(tagged))


def lines_of(message: str) -> list[int]:
    return [int(line.split(":")[1]) for line in message.splitlines()]


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_too_many_levels_are_refused(opening: str) -> None:
    """Too many levels are refused, not ended in a stack trace."""
    message = refusal(opening * 5000)

    assert f"more than {MAX_DEPTH} levels of lists and mappings" in message


@pytest.mark.parametrize("bomb", ["[{0}, {0}, {0}]", "{{<<: [{0}, {0}, {0}], k{1}: 1}}"])
def test_aliases_that_multiply_are_refused(bomb: str) -> None:
    """Aliases count as all that they stand for, and too many are refused before any is made."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} " + bomb.format(f"*a{n - 1}", n) for n in range(1, 40)]

    assert f"it has more than {MAX_VALUES} values" in refusal("\n".join(lines))


@pytest.mark.parametrize("around", ["[{}]", "{{k: {}}}", "{{<<: {}}}"])
def test_aliases_that_add_levels_are_refused(around: str) -> None:
    """Aliases that add levels are refused in the same way, not ended in a stack trace."""
    lines = ["a0: &a0 {x: 1}"]
    for number in range(1, 40):
        value = f"*a{number - 1}"
        for _ in range(40):
            value = around.format(value)
        lines.append(f"a{number}: &a{number} {value}")

    message = refusal("\n".join(lines))

    assert f"it has more than {MAX_DEPTH} nested levels" in message
    assert message.startswith("models.yaml:3: ")


def test_many_models_are_not_too_many() -> None:
    """Hundreds of models with shared settings are not too many."""
    shared = ", ".join(f"k{number}: {number}" for number in range(30))
    text = f"d: &d {{{shared}}}\n" + "\n".join(f"m{number}: {{<<: *d}}" for number in range(500))

    assert 501 == len(read(text))
