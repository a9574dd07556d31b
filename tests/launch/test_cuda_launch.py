"""Configurations that are refused on CUDA, and defaults of models there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hotswap.config.reader import ModelConfig, load_config
from vllm_hotswap.config.sizes import MemoryBudget
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host import cuda_driver
from vllm_hotswap.host.devices import CUDA_WORKER, HOSTED_CPU_WORKER, DeviceMemory
from vllm_hotswap.launch.budget import ModelNeeds, share_kv_memory
from vllm_hotswap.launch.prepare import ModelLaunch, _reason, budget_of, refuse_sleep_mode

GIB = 1 << 30


def vllm_config(worker: str, utilization: float = 0.92, **model: object) -> Any:
    """The part of vLLM's configuration that is read."""
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(worker_cls=worker),
        cache_config=SimpleNamespace(gpu_memory_utilization=utilization),
    )


def model_in(folder: Path) -> tuple[Path, ModelConfig]:
    path = folder / "models.yaml"
    path.write_text("models:\n  one:\n    model: org/one\n    enable_sleep_mode: true\n")
    return path, load_config(path).models[0]


def test_vllms_own_sleep_mode_is_refused_on_cuda(tmp_path: Path) -> None:
    """vLLM's sleep mode serves one model per process: a second model could not be loaded."""
    path, model = model_in(tmp_path)

    with pytest.raises(ConfigError) as error:
        refuse_sleep_mode(model, vllm_config(CUDA_WORKER, enable_sleep_mode=True), path)

    message = error.value.message
    assert message.startswith(f"{path}:4: models.one.enable_sleep_mode: ")
    assert "models sleep here without it, so remove it" in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_other_devices_and_other_settings_are_left_alone(tmp_path: Path, key: str) -> None:
    """Other devices keep their settings, which an out-of-tree platform may need."""
    path, model = model_in(tmp_path)

    refuse_sleep_mode(model, vllm_config(HOSTED_CPU_WORKER, **{key: True}), path)
    refuse_sleep_mode(model, vllm_config("hpu.Worker", **{key: True}), path)
    refuse_sleep_mode(model, vllm_config(CUDA_WORKER, **{key: False}), path)
    refuse_sleep_mode(model, vllm_config(CUDA_WORKER), path)
    with pytest.raises(ConfigError, match=key):
        refuse_sleep_mode(model, vllm_config(CUDA_WORKER, **{key: True}), path)


def test_a_machine_without_a_gpu_is_told_of_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU gets our message instead of vLLM's about inferring a device."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda-of-nobody.so.1")
    error = RuntimeError("Failed to infer device type, please set `VLLM_LOGGING_LEVEL=DEBUG`")

    assert _reason(error).startswith(str(error))  # a GPU of another platform may be missing
    assert "; for an NVIDIA GPU: there is no NVIDIA driver: libcuda-of-nob" in _reason(error)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "; for an NVIDIA GPU: CUDA_VISIBLE_DEVICES is '', which hides" in _reason(error)
    assert "another" == _reason(RuntimeError("another"))


# --- defaults -----------------------------------------------------------------------------------


def launches(*configs: Any) -> list[ModelLaunch]:
    return [
        ModelLaunch(str(number), "org/one", True, SimpleNamespace(), config, 0)  # type: ignore[arg-type]
        for number, config in enumerate(configs)
    ]


@pytest.mark.parametrize("utilization", [0.3, 0.92])
def test_models_share_what_is_free_but_for_a_reserve(utilization: float) -> None:
    """Models share all that is free, whatever `gpu_memory_utilization` would give one server."""
    device = DeviceMemory(total=24 * GIB, free=21 * GIB, held=GIB // 2, reserve=GIB)
    models = launches(*(vllm_config(CUDA_WORKER, utilization) for _ in range(2)))

    assert 21 * GIB == budget_of(models, MemoryBudget(), device).device


def test_on_other_devices_it_bounds_what_models_share() -> None:
    """On other devices, `gpu_memory_utilization` bounds what models share, as before."""
    device = DeviceMemory(total=20 * GIB, free=19 * GIB, held=0)
    models = launches(vllm_config(HOSTED_CPU_WORKER, 0.5))

    assert 9 * GIB == budget_of(models, MemoryBudget(), device).device


@pytest.mark.parametrize(("total", "weights"), [(24, 6), (80, 16)])
def test_two_models_with_nothing_but_a_name_get_kv_memory(total: int, weights: int) -> None:
    """Two models with only a name, loaded together on one GPU, get the same KV memory."""
    device = DeviceMemory(total * GIB, (total - 3) * GIB, GIB // 2, 2 * GIB)
    budget = budget_of(launches(vllm_config(CUDA_WORKER)), MemoryBudget(), device)
    models = [
        ModelNeeds(alias, weights * GIB, None, GIB, 100 * GIB, overhead_bytes=GIB // 2)
        for alias in ("one", "two")
    ]

    shares = share_kv_memory(models, budget.device)

    assert shares["one"] == shares["two"] > 2 * GIB
    held = sum(shares.values()) + sum(model.held_bytes for model in models)
    assert budget.device - GIB < held <= budget.device
