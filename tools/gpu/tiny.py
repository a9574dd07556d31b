"""Phase `tiny`: a server with the tiny models that ship with the package."""

from __future__ import annotations

import asyncio

from benchmarks.servers import Model
from tools.gpu.device import MIB
from tools.gpu.results import Say
from tools.gpu.serving import GRAPHS, Counts, serve
from tools.gpu.task import Task
from vllm_hotswap.demo import quickstart as demo

KV_BYTES = 64 * MIB
COUNTS = Counts(parked=50, cycles=20, cold=10)
OF_A_REHEARSAL = Counts(parked=4, cycles=4, cold=4)


def model(alias: str, name: str, kv_bytes: int = KV_BYTES) -> Model:
    """A tiny model with graphs."""
    settings = {
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": kv_bytes,
        "compilation_config": dict(GRAPHS),
    }
    return Model(alias, demo.MODELS / name, settings)


def run(task: Task, say: Say) -> None:
    counts = OF_A_REHEARSAL if task.is_rehearsal else COUNTS
    models = model("llama", "llama"), model("qwen", "qwen")
    asyncio.run(serve(task, say, models, counts))
