"""Settings that name code, on the installed vLLM: none is undecided, and none is run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

from tools.vllm_seams.imports import decided, imports_in
from tools.vllm_seams.settings import settings_in
from tools.vllm_seams.tree import Tree
from vllm_hotswap.config.code_settings import CHOICES, CODE, code_keys, is_decided

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def tree() -> Tree:
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Tree(Path(found.origin).parents[1])


def test_every_open_setting_has_been_decided(tree: Tree) -> None:
    """Every open setting is decided: a new one fails until its use for code is checked."""
    settings = settings_in(tree)

    assert [] == [str(s) for s in settings if not s.is_closed and not is_decided(s.name)]
    assert {"worker_cls", "cache_dir", "kv_connector_extra_config"} <= {s.name for s in settings}


def test_every_setting_that_names_code_is_refused(tree: Tree) -> None:
    """Every setting that names code is refused, wherever it stands and whatever its value."""
    named = {s.name for s in settings_in(tree) if s.name in CODE}

    for name in named:
        assert [[name]] == list(code_keys({name: "evil.json"})), name
        assert [["x_config", name]] == list(code_keys({"x_config": {name: "évil"}})), name
    assert len(named) > 10


@pytest.mark.wide
def test_every_import_by_name_has_been_decided(tree: Tree) -> None:
    """Every import by name is decided: a new one fails until what reaches it is checked."""
    assert {} == {place: call for place, call in imports_in(tree).items() if place not in decided()}


def test_the_words_of_vllm_are_the_ones_that_pass(tree: Tree) -> None:
    """Only vLLM's own words pass: any other value of such a setting is a class's name."""
    from vllm.config.parallel import DistributedExecutorBackend

    assert set(get_args(DistributedExecutorBackend)) == CHOICES["distributed_executor_backend"]


REFUSED = """
models:
  a: {model: org/a, distributed_executor_backend: evil.json}
  b: {model: org/a, distributed_executor_backend: évil.Cls}
  c: {model: org/a, distributed_executor_backend: my-mod.Cls}
  d: {model: org/a, compilation_config: {backend: evil.json, mode: 2}}
  e: {model: org/a, compilation_config: {inductor_passes: {x: evil.f}}}
"""


@pytest.mark.parametrize("allow", [False, True])
def test_a_check_runs_nothing_that_is_refused(tmp_path: Path, allow: bool) -> None:
    """Neither a check nor vLLM's parser in it runs refused code; with permission, they do."""
    for name in ("evil", "évil", "my-mod"):
        marked = f"open({str(tmp_path / 'ran')!r}, 'a').close()\ndef f(_): ..."
        (tmp_path / f"{name}.py").write_text(marked)
    (tmp_path / "models.yaml").write_text(REFUSED)
    command = [sys.executable, "-m", "vllm_hotswap", "check", str(tmp_path / "models.yaml")]
    paths = os.pathsep.join([*sys.path, str(tmp_path)])

    done = subprocess.run(
        [*command, *(["--allow", "code"] if allow else [])],
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert 1 == done.returncode
    assert (0 if allow else 5) == done.stdout.count("names code that the server would run")
    assert allow == (tmp_path / "ran").exists()
