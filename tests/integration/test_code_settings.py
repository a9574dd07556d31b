"""The installed vLLM has no setting and no import by name of which nothing has been decided."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

from tools.vllm_seams.imports import decided, imports_in
from tools.vllm_seams.settings import settings_in
from tools.vllm_seams.tree import Tree
from vllm_hotswap.code_settings import CHOICES, CODE, code_keys, is_decided

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def tree() -> Tree:
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Tree(Path(found.origin).parents[1])


def test_every_open_setting_has_been_decided(tree: Tree) -> None:
    """A new one fails this until somebody has looked whether it names code."""
    settings = settings_in(tree)

    assert [] == [str(s) for s in settings if not s.is_closed and not is_decided(s.name)]
    assert {"worker_cls", "cache_dir", "kv_connector_extra_config"} <= {s.name for s in settings}


def test_every_setting_that_names_code_is_refused(tree: Tree) -> None:
    """Wherever it stands, whatever its value looks like."""
    named = {s.name for s in settings_in(tree) if s.name in CODE}

    for name in named:
        assert [[name]] == list(code_keys({name: "evil.json"})), name
        assert [["x_config", name]] == list(code_keys({"x_config": {name: "évil"}})), name
    assert len(named) > 10


def test_every_import_by_name_has_been_decided(tree: Tree) -> None:
    """A new one fails this until somebody has looked what reaches it."""
    assert {} == {place: call for place, call in imports_in(tree).items() if place not in decided()}


def test_the_words_of_vllm_are_the_ones_that_pass(tree: Tree) -> None:
    """Any other value of such a setting is the name of a class."""
    from vllm.config.parallel import DistributedExecutorBackend

    assert set(get_args(DistributedExecutorBackend)) == CHOICES["distributed_executor_backend"]
