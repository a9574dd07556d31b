"""References to environment variables in the values of the YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_hotswap.config.references import References
from vllm_hotswap.config.written import Source, Surprising
from vllm_hotswap.errors import ConfigError

FILE = Source(Path("models.yaml"))

ENVIRONMENT = {
    "NAME": "llama",
    "TOKEN": "canary-secret-1",
    "LENGTH": "2048",
    "FLAG": "true",
    "EMPTY": "",
}


def fill(value: Any) -> Any:
    return References(ENVIRONMENT).fill(value, FILE)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${NAME}", "llama"),
        ("/models/${NAME}-${LENGTH}", "/models/llama-2048"),
        ("${LENGTH}", 2048),
        ("${FLAG}", True),
        ("${NOWHERE:-4096}", 4096),
        ("${NOWHERE:-}", None),
        ("a${NOWHERE:-}b", "ab"),
        ("${NAME:-other}", "llama"),
        ("${EMPTY:-other}", "other"),
        ("a${EMPTY}b", "ab"),
        ("$${NAME}", "${NAME}"),
        ("$NAME and $ {NAME}", "$NAME and $ {NAME}"),
        ("{{ messages }}", "{{ messages }}"),
        ("2048", "2048"),
        (17, 17),
        (None, None),
    ],
)
def test_references_are_filled(written: object, expected: object) -> None:
    """A value that is one reference may be any scalar; other text with references stays text."""
    assert expected == fill(written)


def test_references_are_filled_wherever_a_value_stands() -> None:
    """References are replaced in lists and mappings, but not in keys."""
    assert {"a": [{"${NAME}": "llama"}, "llama"]} == fill(
        {"a": [{"${NAME}": "${NAME}"}, "${NAME}"]}
    )


def test_every_variable_that_is_not_set_is_named_with_its_place() -> None:
    """Every unset variable is named with its place and the ways out; its reference stays."""
    references = References(ENVIRONMENT)
    source = Source(Path("models.yaml"), {("models", "a", "model"): 3})

    filled = references.fill({"models": {"a": {"model": "${NOWHERE}", "seed": "${NONE}"}}}, source)

    assert {"models": {"a": {"model": "${NOWHERE}", "seed": "${NONE}"}}} == filled
    assert ["models.yaml:3: models.a.model", "models.yaml: models.a.seed"] == [
        mistake.message.rpartition(": the environment")[0] for mistake in references.unset
    ]
    assert references.unset[0].message.endswith(
        "the environment variable 'NOWHERE' is not set; set it, give a default with "
        "${NOWHERE:-default}, or write $${ for a plain ${"
    )


@pytest.mark.parametrize("value", ["1.10", "7.0", "+5"])
def test_a_number_from_the_environment_is_shown_as_it_was_given(value: str) -> None:
    """A number from the environment is kept as it was given, so that it can be a text."""
    assert value == str(References({"REVISION": value}).fill("${REVISION}", FILE))


def test_a_surprising_value_from_the_environment_is_hidden_in_both_forms() -> None:
    """A surprising value is hidden both as it was given, and as the number that YAML reads."""
    references = References({"SECRET": "0123456712"})
    value = references.fill("${SECRET}", FILE)

    assert isinstance(value, Surprising)
    assert "is ${SECRET}, which YAML reads as ${SECRET}" == references.hide(f"is {value!r}")


def test_a_value_from_the_environment_is_never_shown() -> None:
    """An error shows a value's variable and never the value; a short value is not a secret."""
    references = References(ENVIRONMENT)
    references.fill(["${TOKEN}", "${NAME}"], FILE)

    with pytest.raises(ConfigError) as caught, references.hidden_in_errors():
        raise ConfigError("llama: 'canary-secret-1' can't work")

    assert "llama: '${TOKEN}' can't work" == caught.value.message
    assert caught.value.__cause__ is None
    assert "canary" not in repr(references)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('it\'s "a" secret\n', lambda v: f"is {v!r}"),
        ("two\nlines of   it", lambda v: " ".join(f"is {v}".split())),
        ('quoted "json"', lambda v: f"is {json.dumps(v)}"),
        ("0123456789.50", lambda v: f"is {float(v)}"),
    ],
)
def test_a_value_is_hidden_in_whatever_form_it_is_shown(
    value: str, message: Callable[[str], str]
) -> None:
    """A value is hidden in every form: quoted, on one line, as JSON, as a number."""
    references = References({"SECRET": value})
    references.fill("${SECRET}", FILE)

    hidden = references.hide(message(value))

    assert "is ${SECRET}" == hidden.replace('"', "").replace("'", "")


def test_the_longest_value_is_hidden_first() -> None:
    """The longest value is hidden first, so a value that starts with another leaves nothing."""
    references = References({"A": "database1", "B": "database1-topsecret"})
    references.fill(["${A}", "${B}"], FILE)

    assert "at ${B}" == references.hide("at database1-topsecret")
