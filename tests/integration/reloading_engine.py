"""A program for `test_compiled_reload.py`: a compiled and an eager engine of one model, reloaded.

Prints what it saw as one line of JSON, the last of its output.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import psutil

from vllm_hotswap.host import teardown
from vllm_hotswap.host.classes import QUALIFIED_NAME as EXECUTOR
from vllm_hotswap.host.devices import HOSTED_CPU_WORKER as WORKER
from vllm_hotswap.host.engine import HostedEngine
from vllm_hotswap.host.executor import HostedExecutor
from vllm_hotswap.host.heap import give_back_free_memory
from vllm_hotswap.host.messages import SocketPaths

WARM_UPS, CYCLES = 5, 10
PROMPTS = [[1, 5, 9, 33], list(range(3, 40)), [1]]


class Engine:
    """A hosted engine and the configuration that it was made with."""

    def __init__(self, folder: Path, name: str, *, eager: bool) -> None:
        self.config = pickle.dumps(engine_config(folder, eager))
        sockets = SocketPaths(*(f"ipc://{folder.parent}/{name}-{way}" for way in ("in", "out")))
        before = time.monotonic()
        self.hosted = HostedEngine(
            pickle.loads(self.config),  # noqa: S301  # made three lines above
            HostedExecutor,
            log_stats=True,
            sockets=sockets,
            ring=lambda: None,
        )
        self.load_s = time.monotonic() - before

    def reload(self) -> float:
        before = time.monotonic()
        self.hosted.reload(pickle.loads(self.config), True)  # noqa: S301  # made in __init__
        return time.monotonic() - before

    def unload(self) -> None:
        self.hosted.unload()
        teardown.collect_leftovers()
        give_back_free_memory()

    def model(self) -> Any:
        return self.hosted.model_executor.driver_worker.worker.get_model()

    def answers(self) -> list[list[int]]:
        return [self._answer(prompt) for prompt in PROMPTS]

    def _answer(self, prompt: list[int]) -> list[int]:
        self.hosted.add_request(*self.hosted.preprocess_add_request(greedy(prompt)))
        tokens: list[int] = []
        while self.hosted.has_work():
            outputs, _ = self.hosted.step_fn()
            for of_client in outputs.values():
                for output in of_client.outputs:
                    tokens += output.new_token_ids
        return tokens


def engine_config(folder: Path, eager: bool) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder),
        # bfloat16 is packed only by processors with AVX-512 or AMX, float32 by all with oneDNN.
        dtype="float32",
        enforce_eager=eager,
        kv_cache_memory_bytes=32 << 20,
        max_model_len=256,
        max_num_seqs=4,
        worker_cls=WORKER,
        distributed_executor_backend=EXECUTOR,
    ).create_engine_config()


def greedy(prompt: list[int]) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=os.urandom(8).hex(),
        external_req_id="",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def compilations() -> int:
    from vllm.compilation.counter import compilation_counter

    count: int = compilation_counter.num_aot_compiles
    return count


def hooks() -> int:
    """Return how many hooks Dynamo has, each of which keeps a module."""
    from torch._dynamo.convert_frame import _bytecode_hooks

    return len(_bytecode_hooks)


def resources() -> dict[str, int]:
    process = psutil.Process()
    return {
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "children": len(process.children()),
        "hooks": hooks(),
    }


def weights_alive_after_unload(engine: Engine) -> int:
    """Return parameters that something still holds after the model was unloaded."""
    weights = [weakref.ref(weight) for weight in engine.model().parameters()]
    assert weights
    engine.unload()
    return sum(weight() is not None for weight in weights)


def change_weights(folder: Path) -> None:
    """Give the checkpoint other values, with which the model answers other tokens."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    noisy = {name: tensor + torch.randn_like(tensor) * 0.05 for name, tensor in tensors.items()}
    save_file(noisy, file, metadata={"format": "pt"})


def cycle(engine: Engine) -> list[list[int]]:
    engine.unload()
    engine.reload()
    return engine.answers()


def main(folder: Path) -> dict[str, Any]:
    compiled = Engine(folder, "compiled", eager=False)
    seen: dict[str, Any] = {"load_s": compiled.load_s, "compilations": compilations()}
    eager = Engine(folder, "eager", eager=True)
    seen["first"], seen["first_eager"] = compiled.answers(), eager.answers()
    seen["after_cycles"] = [cycle(compiled) for _ in range(WARM_UPS)]
    before, resident = resources(), psutil.Process().memory_info().rss
    seen["after_cycles"] += [cycle(compiled) for _ in range(CYCLES)]
    seen["growth_bytes"] = psutil.Process().memory_info().rss - resident
    seen["resources"] = [before, resources()]
    seen["of_other_engine"] = eager.answers()

    seen["weights_alive"] = weights_alive_after_unload(compiled)
    seen["hooks_after_unload"] = hooks()
    eager.unload()
    change_weights(folder)
    seen["reload_s"], seen["reload_eager_s"] = compiled.reload(), eager.reload()
    seen["changed"], seen["changed_eager"] = compiled.answers(), eager.answers()
    seen["compilations_in_all"] = compilations()
    return seen


def load_once(folder: Path) -> dict[str, Any]:
    compiled = Engine(folder, "again", eager=False)
    return {
        "load_s": compiled.load_s,
        "compilations": compilations(),
        "tokens": compiled.answers(),
    }


if __name__ == "__main__":
    program = {"cycles": main, "once": load_once}[sys.argv[1]]
    sys.stdout.write(json.dumps(program(Path(sys.argv[2]))) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the IO threads of an engine never end
