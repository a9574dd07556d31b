"""The installed vLLM has everything where it is looked for."""

from __future__ import annotations

import pytest

from vllm_hotswap.compat.names import PLACES, find
from vllm_hotswap.compat.versions import vllm_version, warning


@pytest.mark.parametrize("name", PLACES)
def test_every_name_is_found(name: str) -> None:
    """Under the name by which it is asked for, and callable."""
    found = find(name)

    assert name == found.__name__
    assert callable(found)


def test_the_version_is_one_that_was_run() -> None:
    """`make test` never runs on a version that users are warned of."""
    assert warning(vllm_version()) is None
