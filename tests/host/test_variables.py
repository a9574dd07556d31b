"""Environment variables of models: the result never depends on what was active before."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.host.variables import Variables

ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "file": {"QUANT_CONFIG": "/a.json"},
    "other": {"QUANT_CONFIG": "/b.json"},
    "cleared": {"QUANT_CONFIG": None},
    "kept": {},
}


def seen_by(alias: str, at_start: str | None) -> str | None:
    """Return what a model should see: its own value, or the one that the server started with."""
    return ENVIRONMENTS[alias].get("QUANT_CONFIG", at_start)


@given(
    at_start=st.sampled_from([None, "/server.json"]),
    steps=st.lists(
        st.tuples(st.sampled_from(["activate", "load"]), st.sampled_from(list(ENVIRONMENTS)))
    ),
)
def test_a_model_finds_the_same_whatever_came_before(
    at_start: str | None, steps: list[tuple[str, str]]
) -> None:
    """A model sees the same values after any loads and activations; a load restores them."""
    environment = {"PATH": "/bin"} | ({"QUANT_CONFIG": at_start} if at_start else {})
    variables, active = Variables(environment), None
    for step, alias in steps:
        variables.register(alias, ENVIRONMENTS[alias])
        if step == "activate":
            variables.activate(alias)
            active = alias
        else:
            with variables.applied(alias):
                assert seen_by(alias, at_start) == environment.get("QUANT_CONFIG")
        expected = seen_by(active, at_start) if active else at_start
        assert expected == environment.get("QUANT_CONFIG")
    assert "/bin" == environment["PATH"]


def test_variables_are_back_after_a_load_that_failed() -> None:
    """A failed load restores the active model's variables."""
    environment: dict[str, str] = {}
    variables = Variables(environment)
    variables.register("file", ENVIRONMENTS["file"])

    with pytest.raises(RuntimeError, match="broken"), variables.applied("file"):
        raise RuntimeError("broken")

    assert {} == environment
