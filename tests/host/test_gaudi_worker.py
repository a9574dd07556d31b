"""What the worker on a Gaudi reports about sleep and buckets; on tensors of the CPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class PluginsWorker:
    """The plugin's worker, whose handling of blocks does not matter here."""

    def __init__(self, runner: Any, config: Any) -> None:
        self.model_runner, self.vllm_config = runner, config

    def initialize_from_config(self, kv_cache_config: Any) -> Any:
        return kv_cache_config.num_blocks


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return our module, over a plugin with that worker, whose device is the CPU."""
    name = "vllm_gaudi.v1.worker.hpu_worker"
    for depth in range(1, 5):
        part = ".".join(name.split(".")[:depth])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    vars(sys.modules[name]).update(HPUWorker=PluginsWorker)
    monkeypatch.delitem(sys.modules, "vllm_hotswap.host.gaudi_worker", raising=False)
    from vllm_hotswap.host import gaudi_worker

    monkeypatch.setattr(gaudi_worker, "DEVICE_TYPE", "cpu")
    monkeypatch.setitem(sys.modules, gaudi_worker.__name__, gaudi_worker)
    return gaudi_worker


class Model(torch.nn.Module):  # type: ignore[misc]  # torch's types stop here
    """1,000 bytes of weights that two layers share, 16 of a buffer, and 64 that are elsewhere.

    A second buffer is a view of 8 bytes of the first: one piece of the device, two on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Linear(25, 10, bias=False)
        self.head = torch.nn.Linear(25, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("angles", torch.zeros(4))
        self.register_buffer("first_angles", self.angles[:2])
        self.register_buffer("away", torch.zeros(16, device="meta"))


def test_what_a_sleep_gives_back_and_takes(module: Any) -> None:
    """Each piece of the device's memory counts once; KV memory goes, with the plugin's own blocks.

    Memory elsewhere does not count. On the host each tensor that moves has memory of its own.
    """
    kv = torch.zeros(8, 32)
    caches = [(kv[:4], kv[4:], None), torch.zeros(10), (torch.zeros(5, dtype=torch.int8),)]
    caches += [torch.zeros(64, device="meta"), [torch.zeros(32, device="meta")]]
    runner = SimpleNamespace(model=Model(), kv_caches=caches)
    worker = module.HostedHPUWorker(runner, None)

    assert (1000 + 16 + 1024 + 40 + 5, 1000 + 16 + 8) == worker.sleep_bytes()

    slots = torch.zeros(128, dtype=torch.int64)
    runner.defragmenter = SimpleNamespace(cache_utils=SimpleNamespace(block_slots=slots))
    assert (1000 + 16 + 1024 + 40 + 5 + 1024, 1000 + 16 + 8) == worker.sleep_bytes()


@pytest.mark.parametrize(
    ("sequences", "blocks", "is_contiguous", "told"),
    [
        (15, 512, False, None),
        (16, 513, False, None),
        (16, 512, False, "needed=513 blocks=512 next='{lower} 15'"),
        (17, 513, False, "needed=545 blocks=513 next='{lower} 16'"),
        (2, 20, False, "needed=65 blocks=20 next='{lower} 1'"),
        (16, 512, True, None),
    ],
)
def test_buckets_beyond_the_blocks_are_told(
    module: Any,
    caplog: pytest.LogCaptureFixture,
    sequences: int,
    blocks: int,
    is_contiguous: bool,
    told: str | None,
) -> None:
    """The report has the number of sequences for which there are blocks. One block is vLLM's null
    block.

    16 sequences of the guide's own configuration need all of its 513. Fewer than one sequence is
    not a setting. With contiguous paged attention the plugin makes no such buckets. The load
    continues.
    """
    caplog.set_level("INFO")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=sequences),
        model_config=SimpleNamespace(max_model_len=4000, model="llama"),
        cache_config=SimpleNamespace(block_size=128),
    )
    runner = SimpleNamespace(use_contiguous_pa=is_contiguous)
    worker = module.HostedHPUWorker(runner, config)

    assert blocks == worker.initialize_from_config(SimpleNamespace(num_blocks=blocks))

    lower = "if the warm-up takes too long, lower max_num_seqs to"
    expected = (
        []
        if told is None
        else [
            f"event=buckets_beyond_blocks model=llama max_num_seqs={sequences} "
            + told.format(lower=lower)
        ]
    )
    assert expected == caplog.messages
