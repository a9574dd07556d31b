"""Starts on a Gaudi that cannot work: one line each says what is wrong, and what to do.

Runs under `make rehearse-gaudi`; elsewhere there is no `hpu`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.gaudi_standin.build import SITE as STANDIN
from tests.integration.processes import QUICKSTART_MODULE, ROOT
from tests.ports import free_port
from vllm_hotswap.demo import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("habana_frameworks", "vllm_gaudi")),
        reason="there is no Gaudi plugin and no device for it",
    ),
]

MODEL = f"models: {{llama: {{model: {MODELS / 'llama'}, enforce_eager: true{{more}}}}}}"


@dataclass(frozen=True)
class Case:
    said: str
    plugin: str | None = None
    """Version and code of another plugin that is found first."""
    environment: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    """Settings of the model."""
    has_plugin: bool = True
    has_runtime: bool = True


CASES = {
    "no plugin": Case(
        f"for a Gaudi: there is no package vllm-gaudi in {sys.prefix}; install it there",
        has_plugin=False,
    ),
    "a plugin for another vLLM": Case(
        "for a Gaudi: vllm-gaudi 0.24.1 is for vLLM 0.24, and this is vLLM 0.26.0; "
        "install vllm-gaudi 0.26",
        plugin="0.24.1",
    ),
    "no software of Intel's": Case(
        f"install the one for vllm-gaudi 0.26.0 into {sys.prefix}",
        has_runtime=False,
    ),
    "no device": Case(
        "for a Gaudi: Intel's software sees no device; look what hl-smi says",
        environment={"FAKEHPU_ABSENT": "1"},
    ),
    "QUANT_CONFIG names a file that is gone": Case(
        "QUANT_CONFIG is 'gone.json', and there is no such file; correct it, or set "
        "quant_config: null for a model that is not quantised",
        environment={"QUANT_CONFIG": "gone.json"},
    ),
    "quant_config names a file that is gone": Case(
        "gone.json",
        more=", quant_config: gone.json",
    ),
}

HIDE = """
import importlib.metadata as metadata, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm_gaudi":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
found = metadata.MetadataPathFinder.find_distributions
def without(context=metadata.DistributionFinder.Context()):
    return (d for d in found(context) if d.metadata["Name"].replace("_", "-") != "vllm-gaudi")
metadata.MetadataPathFinder.find_distributions = staticmethod(without)
"""
"""As `sitecustomize`: the environment as it is without the plugin."""


def other_plugin(folder: Path, version: str) -> None:
    """One whose platform cannot be had with this vLLM, which passes over it in silence."""
    information = folder / f"vllm_gaudi-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Name: vllm-gaudi\nVersion: {version}\n")
    (information / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nhpu = vllm_gaudi:register\n"
    )
    package = folder / "vllm_gaudi"
    package.mkdir()
    (package / "__init__.py").write_text("from vllm import no_such_name\n")


@pytest.mark.parametrize("name", CASES)
def test_a_start_that_cannot_work_says_why(name: str, tmp_path: Path) -> None:
    """In its last line, before any model is loaded."""
    case = CASES[name]
    config = tmp_path / "models.yaml"
    config.write_text(MODEL.replace("{more}", case.more), encoding="utf-8")
    site = tmp_path / "site"
    site.mkdir()
    if case.plugin is not None:
        other_plugin(site, case.plugin)
    if not case.has_plugin:
        (site / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    path = [
        str(site),
        *(
            folder
            for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep)
            if case.has_runtime or Path(folder) != STANDIN
        ),
    ]
    environment = {
        **os.environ,
        "VLLM_HPU_MULTI_MODEL_CONFIG": str(config),
        "PYTHONPATH": os.pathsep.join(path),
        **case.environment,
    }
    ran = subprocess.run(
        [sys.executable, "-m", QUICKSTART_MODULE, "--port", str(free_port())],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert 0 != ran.returncode
    last = [line for line in ran.stderr.splitlines() if line.strip()][-1]
    assert last.startswith("vllm-hotswap: error: ")
    assert case.said in last
    assert "Traceback" not in ran.stderr
