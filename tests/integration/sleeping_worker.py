"""A program for `test_cpu_worker.py`: one engine in one process, put to sleep in every way.

Prints what it saw as one line of JSON, the last of its output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from vllm_hotswap.host.classes import QUALIFIED_NAME as EXECUTOR
from vllm_hotswap.host.devices import HOSTED_CPU_WORKER

KV_BYTES = 256 << 20
PROMPTS = ["Hello", "The quick brown fox " * 20]


def main(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    if settings.pop("quantise", False):
        quantise(folder)
    llm = LLM(
        model=str(folder),
        worker_cls=HOSTED_CPU_WORKER,
        distributed_executor_backend=EXECUTOR,
        kv_cache_memory_bytes=KV_BYTES,
        max_model_len=256,
        max_num_seqs=4,
        **settings,
    )
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    worker = executor.driver_worker.worker
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def generate() -> list[list[int]]:
        llm.reset_prefix_cache()
        outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def cycle(level: int) -> list[list[int]]:
        executor.sleep(level)
        executor.wake_up()
        return generate()

    def wake_with(spoil: Callable[[Path], None]) -> str:
        """Return what a wake raises after the checkpoint of the discarded model was spoiled."""
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        spoil(weights)
        try:
            executor.wake_up()
        except Exception as error:  # noqa: BLE001  # whatever it is, the test looks at it
            return f"{type(error).__name__}: {error}"
        finally:
            weights.write_bytes(whole)
        return "no error"

    seen: dict[str, Any] = {
        "kv_bytes": worker._kv_memory.nbytes,
        "supports_discard": executor.collective_rpc("supports_discard"),
        "first": generate(),
    }
    used = memory(worker)
    seen["gives_back"] = worker.weights_bytes()
    executor.sleep(1)
    seen["kv_is_zero"] = not any(cache.any() for cache in worker.model_runner.kv_caches)
    executor.wake_up()
    seen["after_level_1"] = generate()
    executor.sleep(2)
    seen["weights_used"], seen["weights_left"] = used, memory(worker)
    seen["gives_back_no_more"] = worker.weights_bytes()
    seen["repr"] = repr(worker._dropped)
    executor.collective_rpc("wake_up", kwargs={"tags": ["kv_cache"]})
    seen["weights_left_by_kv_tag"] = memory(worker)
    seen["truncated"] = wake_with(truncate)
    seen["missing"] = wake_with(Path.unlink)
    seen["reshaped"] = wake_with(reshape)
    executor.wake_up()
    seen["after_failures"] = generate()
    resident = psutil.Process().memory_info().rss
    seen["after_cycles"] = [cycle(2) for _ in range(5)]
    seen["growth_bytes"] = psutil.Process().memory_info().rss - resident
    return seen


def memory(worker: Any) -> int:
    """Return the bytes of parameters, and 1 for each live oneDNN matrix multiplication."""
    from vllm_hotswap.host.weights import Weights

    weights = Weights.of(worker.get_model())
    live = sum(handler.handler_tensor is not None for handler in weights.handlers.values())
    return live + sum(tensor.untyped_storage().nbytes() for tensor in weights.tensors.values())


def quantise(folder: Path) -> None:
    """Give the checkpoint 8-bit weights, with a scale per row, and 8-bit activations."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**integers, "strategy": "channel", "dynamic": False},
                "input_activations": {**integers, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def reshape(weights: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, weights)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))) + "\n")
