"""Hosted engines without a server: for programs that inspect the engine host's process."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType

from vllm_hotswap.host import teardown
from vllm_hotswap.host.classes import QUALIFIED_NAME as EXECUTOR
from vllm_hotswap.host.devices import HOSTED_CPU_WORKER
from vllm_hotswap.host.engine import HostedEngine
from vllm_hotswap.host.executor import HostedExecutor
from vllm_hotswap.host.messages import SocketPaths

PROMPTS = [[1, 5, 9, 33], list(range(3, 40)), [7]]

ENGINE_ARGUMENTS = {
    "dtype": "float32",  # packed by all processors that have oneDNN
    "enforce_eager": True,
    "kv_cache_memory_bytes": 16 << 20,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "skip_tokenizer_init": True,
}


class QuietEngine(HostedEngine):
    """An engine that keeps its outputs in its queue."""

    def process_output_sockets(self, *args: Any, **kwargs: Any) -> None:
        """Send nothing."""


class Hosted:
    """One engine in this process, which can be unloaded and loaded again."""

    def __init__(self, checkpoint: Path, name: str, **arguments: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs

        self.name = name
        config = EngineArgs(
            model=str(checkpoint),
            worker_cls=HOSTED_CPU_WORKER,
            distributed_executor_backend=EXECUTOR,
            **{**ENGINE_ARGUMENTS, **arguments},
        ).create_engine_config()
        self._config = pickle.dumps(config)
        ways = (f"ipc://{checkpoint.parent}/{name}-{way}" for way in ("in", "out"))
        self.engine = QuietEngine(
            self._new_config(), HostedExecutor, True, SocketPaths(*ways), lambda: None
        )

    def _new_config(self) -> Any:
        return pickle.loads(self._config)  # noqa: S301  # made above

    def reload(self) -> None:
        self.engine.reload(self._new_config(), True)

    def unload(self) -> None:
        self.engine.unload()
        teardown.collect_leftovers()

    def greedy(self) -> list[list[int]]:
        return [self.ask(prompt, temperature=0) for prompt in PROMPTS]

    def unseeded(self, count: int = 1) -> list[list[int]]:
        return [self.ask(PROMPTS[0], temperature=2.0) for _ in range(count)]

    def pooled(self) -> list[float]:
        from vllm.pooling_params import PoolingParams

        (output,) = self._outputs(PROMPTS[1], pooling_params=PoolingParams(task="embed"))
        return [round(value, 5) for value in output.pooling_output.flatten()[:8].tolist()]

    def ask(self, prompt: list[int], **sampling: Any) -> list[int]:
        """Return the token ids of the answer."""
        from vllm.sampling_params import SamplingParams

        params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **sampling})
        outputs = self._outputs(prompt, sampling_params=params)
        return [token for output in outputs for token in output.new_token_ids]

    def _outputs(self, prompt: list[int], **params: Any) -> list[Any]:
        request = self.engine.preprocess_add_request(request_of(prompt, **params))
        self.engine.input_queue.put_nowait((EngineCoreRequestType.ADD, request))
        self.engine.take_input()
        while self.engine.has_work():
            self.engine.run_step()
        outputs = []
        while not self.engine.output_queue.empty():
            _, of_client = self.engine.output_queue.get_nowait()
            outputs += of_client.outputs
        return outputs


def request_of(prompt: list[int], sampling_params: Any = None, pooling_params: Any = None) -> Any:
    return EngineCoreRequest(
        request_id=os.urandom(8).hex(),
        external_req_id="",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=sampling_params,
        pooling_params=pooling_params,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
