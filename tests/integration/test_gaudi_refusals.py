"""Starts on a Gaudi that cannot work: one line each says what is wrong, and what to do.

Runs under `make rehearse-gaudi`; elsewhere there is no `hpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.gaudi_standin.build import SITE as STANDIN
from tests.gaudi_standin.common import held_by_another, needs_plugin
from tests.helpers.ports import free_port
from tests.integration.processes import QUICKSTART_MODULE, ROOT
from vllm_hotswap.demo.quickstart import MODELS

pytestmark = [
    pytest.mark.wide,
    pytest.mark.timeout(300),
    needs_plugin,
]

MODEL = f"models: {{llama: {{model: {MODELS / 'llama'}, enforce_eager: true{{more}}}}}}"


ERROR = "vllm-hotswap: error: "
NO_DEVICE = (
    "Failed to infer device type, please set the environment variable "
    "`VLLM_LOGGING_LEVEL=DEBUG` to turn on verbose logging to help debug the issue.; "
)
"""vLLM's own words."""
NO_DRIVER = (
    "there is no NVIDIA driver: libcuda.so.1 cannot be loaded (libcuda.so.1: cannot open shared "
    "object file: No such file or directory); install it, or run the container with --gpus all"
)
"""Printed by torch's build for CUDA, which the rehearsal has."""
NO_ACQUIRE = (
    "the device cannot be used: synStatus=8 [Device not found] Device acquire failed."  # Intel's
)


@dataclass(frozen=True)
class Case:
    said: str
    """The last line without its start; `FOLDER` is the test's."""
    plugin: str | None = None
    """The version of another plugin that is found first."""
    registers: bool = False
    """Whether that plugin's platform works with this vLLM."""
    environment: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    """Settings of the model."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files beside the configuration."""
    has_plugin: bool = True
    has_runtime: bool = True


CASES = {
    "no plugin": Case(
        f"{NO_DEVICE}for an NVIDIA GPU: {NO_DRIVER}; for a Gaudi: there is no package vllm-gaudi "
        f"in {sys.prefix}; install it there",
        has_plugin=False,
    ),
    "a plugin for another vLLM": Case(
        "vllm-gaudi 0.24.1 is for vLLM 0.24, and this is vLLM 0.26.0; "
        "install vllm-gaudi 0.26, or uninstall it",
        plugin="0.24.1",
    ),
    "a plugin for another vLLM, which vLLM takes": Case(
        "vllm-gaudi 0.27.0 is for vLLM 0.27, and this is vLLM 0.26.0; "
        "install vllm-gaudi 0.26, or uninstall it",
        plugin="0.27.0",
        registers=True,
    ),
    "no software of Intel's": Case(
        "for a Gaudi: Intel's software cannot be imported "
        "(habana_frameworks.torch: No module named 'habana_frameworks'); "
        f"install the one for vllm-gaudi 0.26.0 into {sys.prefix}",
        has_runtime=False,
    ),
    "no device": Case(
        f"{NO_ACQUIRE}; for a Gaudi: Intel's software sees no device; run hl-smi",
        environment={"FAKEHPU_ABSENT": "1"},
    ),
    "QUANT_CONFIG names a file that is gone": Case(
        "FOLDER/models.yaml:1: models.llama: QUANT_CONFIG is 'gone.json', and there is no such "
        "file; correct it, or set quant_config: null for a model that is not quantised",
        environment={"QUANT_CONFIG": "gone.json"},
    ),
    "quant_config names a file that is gone": Case(
        "FOLDER/models.yaml:1: models.llama.quant_config: "
        "the file 'FOLDER/gone.json' does not exist",
        more=", quant_config: gone.json",
    ),
    "quant_config asks for a calibration": Case(
        "FOLDER/models.yaml:1: models.llama: QUANT_CONFIG is 'FOLDER/measure.json', whose "
        "mode is MEASURE; with several models in one process no measurements would be saved; "
        "calibrate with plain vLLM, and name a file whose "
        "mode is QUANTIZE",
        more=", quant_config: measure.json",
        files={"measure.json": '{"mode": "MEASURE"}'},
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
"""As `sitecustomize`: make the environment look as if the plugin were missing."""


def other_plugin(folder: Path, version: str, registers: bool) -> None:
    """Make a plugin that vLLM takes; or one whose platform fails, which vLLM silently ignores."""
    information = folder / f"vllm_gaudi-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Name: vllm-gaudi\nVersion: {version}\n")
    (information / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nhpu = vllm_gaudi:register\n"
    )
    if registers:
        return
    package = folder / "vllm_gaudi"
    package.mkdir()
    (package / "__init__.py").write_text("from vllm import no_such_name\n")


@pytest.mark.parametrize("name", CASES)
def test_a_start_that_cannot_work_says_why(name: str, tmp_path: Path) -> None:
    """A start that cannot work says why in its last line, before any model is loaded."""
    case = CASES[name]
    config = tmp_path / "models.yaml"
    config.write_text(MODEL.replace("{more}", case.more), encoding="utf-8")
    for file, content in case.files.items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    site = tmp_path / "site"
    site.mkdir()
    if case.plugin is not None:
        other_plugin(site, case.plugin, case.registers)
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
    last, ran = last_line(config, {"PYTHONPATH": os.pathsep.join(path), **case.environment})
    assert last == ERROR + case.said.replace("FOLDER", str(tmp_path))
    assert 0 != ran.returncode
    assert "Traceback" not in ran.stderr


def last_line(
    config: Path, environment: Mapping[str, str]
) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Return the last line of a start with this configuration."""
    ran = subprocess.run(
        [sys.executable, "-m", QUICKSTART_MODULE, "--port", str(free_port())],
        env={**os.environ, "VLLM_HPU_MULTI_MODEL_CONFIG": str(config), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    return [line for line in ran.stderr.splitlines() if line.strip()][-1], ran


def test_a_device_that_another_process_has_is_told(tmp_path: Path) -> None:
    """A device that another process has is reported: one process at a time can use a Gaudi."""
    config = tmp_path / "models.yaml"
    config.write_text(MODEL.replace("{more}", ""), encoding="utf-8")
    board = tmp_path / "board"
    board.mkdir()
    with held_by_another(board):
        last, ran = last_line(config, {"FAKEHPU_BOARD": str(board)})

    assert last == (f"{ERROR}{NO_ACQUIRE}; run hl-smi, which shows whether another process has it")
    assert 0 != ran.returncode
    assert "Traceback" not in ran.stderr
