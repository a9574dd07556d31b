"""The zoo is what the page about it says."""

from __future__ import annotations

from pathlib import Path

from tests.zoo import models
from tests.zoo.models import ZOO

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"


def test_the_page_lists_the_models_that_are_run() -> None:
    """The page lists every model that is run, and vLLM's message where one cannot be."""
    rows = [line for line in PAGE.read_text().splitlines(keepends=True) if line.startswith("| `")]
    listed = [row for row in rows if row.count("|") == 5]

    assert models.table() == "".join(listed)


def test_every_model_has_a_name_of_its_own() -> None:
    """Every model has a unique name, and an unsupported one a message to be found by."""
    assert len(ZOO) == len({model.alias for model in ZOO})
    assert all(model.cannot for model in ZOO if model.unless)
