"""Other CPUs, as far as one can be made to look like them: each environment is a server.

float32 is packed by every CPU with oneDNN, so that embedding and output layer are there twice, as
bfloat16 has them on CPUs with AVX-512 or AMX.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import medium
from tests.helpers.ports import free_port
from tests.integration.processes import QUICKSTART_MODULE, ServerProcess
from tests.integration.watching import MemoryWatch
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.engines.base_memory import STEP_BYTES, expected_memory
from vllm_hotswap.host.devices import CpuDevice
from vllm_hotswap.launch.prepare import parse_flags, prepare

pytestmark = [
    pytest.mark.all_cores,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="cores and pages are Linux's"),
]

PR_SET_THP_DISABLE = 41
"""https://man7.org/linux/man-pages/man2/PR_SET_THP_DISABLE.2const.html"""

SIZES = {**medium.SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
LAYERS = {"one": 2, "two": 3}
KV_BYTES = 32 << 20
PROMPTS = ["Hello", "The quick brown fox"]


@dataclass(frozen=True)
class Machine:
    """How a server is made to see another machine."""

    variables: dict[str, str] = field(default_factory=dict)
    cores: int | None = None
    huge_pages: bool = True


MACHINES = {
    "avx2": Machine({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "scalar": Machine({"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}),
    "one_core": Machine(cores=1),
    "huge_pages": Machine({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    "small_pages": Machine(huge_pages=False),
}

QUICK = {"one_core"}
"""What CI starts, too; the others are for the night."""


@contextmanager
def seen_by_children(machine: Machine) -> Iterator[None]:
    """Give processes started within it so many cores, and such pages."""
    cores = os.sched_getaffinity(0)
    if machine.cores is not None:
        os.sched_setaffinity(0, sorted(cores)[: machine.cores])
    if not machine.huge_pages:
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environments")
    for alias, layers in LAYERS.items():
        medium.make(MODELS / "qwen", folder / alias, {**SIZES, "num_hidden_layers": layers})
    return folder


def configuration(folder: Path, memory: str = "") -> Path:
    flags = "dtype: float32, max_model_len: 256, enforce_eager: true, "
    flags += f"kv_cache_memory_bytes: {KV_BYTES}"
    models = "".join(f"  {alias}: {{model: {folder / alias}, {flags}}}\n" for alias in LAYERS)
    path = folder / "models.yaml"
    path.write_text(f"{memory}default_model: one\nmodels:\n{models}", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.wide if name in QUICK else pytest.mark.long)
        for name in MACHINES
    ],
)
def test_models_switch_within_what_was_estimated(folder: Path, name: str) -> None:
    """With room for one model by the estimate alone, every switch works, memory stays within it,
    and each model answers the same whenever it is back.
    """
    config = load_config(configuration(folder))
    needs = [model.needs for model in prepare(config, parse_flags(config, [])).models]
    room = max(each.held_bytes + each.reading_bytes for each in needs) + KV_BYTES
    # A host that sees other instructions or cores holds some pages more or less.
    base = expected_memory(CpuDevice(), lambda _: None).held + 4 * STEP_BYTES
    path = configuration(folder, f"memory: {{device: {base + room}}}\n")
    machine = MACHINES[name]
    environment = {
        **machine.variables,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOTSWAP_CONFIG": str(path),
    }
    with seen_by_children(machine):
        server = ServerProcess.start(
            ["-m", QUICKSTART_MODULE], free_port(), folder / f"{name}.log", environment
        )
    status: Any = server.status()
    with MemoryWatch(status["host"]["pid"]) as memory:
        rounds = [{alias: answers(server, alias) for alias in LAYERS} for _ in range(3)]
    held: Any = server.status()["models"]
    status = server.status()
    assert server.stop() == 0, server.log_tail()

    assert rounds[0] == rounds[1] == rounds[2]
    assert rounds[0]["one"] != rounds[0]["two"]
    assert memory.most_bytes <= status["memory"]["device"]["budget"]
    # "two" is the active one.
    assert held["two"]["held"]["device_bytes"] <= needs[1].held_bytes + KV_BYTES


def answers(server: ServerProcess, alias: str) -> list[str]:
    server.switch(alias)
    return [server.complete(alias, prompt, max_tokens=8) for prompt in PROMPTS]
