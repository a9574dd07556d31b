"""The worker of the vLLM Gaudi plugin, which tells what its sleep gives back.

Named by its qualified name in `parallel_config.worker_cls`. It sleeps and wakes as the plugin's
own does. Checked on vllm-gaudi 0.26.0.

Relies on, in `HPUWorker`: `sleep`, which moves the parameters and buffers of `model_runner.model`
to the host, and drops `model_runner.kv_caches` and `model_runner.defragmenter`, which has a tensor
`cache_utils.block_slots`; `initialize_from_config`, which makes these, and warms up buckets for
`max_num_seqs` sequences, even if there are fewer KV blocks, unless
`model_runner.use_contiguous_pa`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

from vllm_gaudi.v1.worker.hpu_worker import HPUWorker

from vllm_hotswap.host.gaudi import DEVICE_TYPE
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap.host")


class HostedHPUWorker(HPUWorker):  # type: ignore[misc]  # the plugin has no types
    """The plugin's worker, one of several in a process."""

    def sleep_bytes(self) -> tuple[int, int]:
        """Device memory that a sleep gives back, and host memory that it takes. In bytes.

        The blocks that the plugin keeps besides those of vLLM are among what it gives back.
        """
        model = self.model_runner.model
        moved = [tensor for tensor in (*model.parameters(), *model.buffers()) if _is_on(tensor)]
        blocks = getattr(getattr(self.model_runner, "defragmenter", None), "cache_utils", None)
        dropped = _tensors([*self.model_runner.kv_caches, getattr(blocks, "block_slots", None)])
        return _storage_bytes([*moved, *dropped]), sum(tensor.nbytes for tensor in moved)

    def initialize_from_config(self, kv_cache_config: Any) -> Any:
        config = self.vllm_config
        limit, length = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
        each = math.ceil(length / config.cache_config.block_size)
        needed, blocks = limit * each + 1, kv_cache_config.num_blocks  # vLLM keeps a null block
        if needed > blocks and not self.model_runner.use_contiguous_pa:
            log.info(
                "event=buckets_beyond_blocks model=%s max_num_seqs=%d needed=%d blocks=%d "
                "next='if the warm-up takes too long, lower max_num_seqs to %d'",
                value_text(config.model_config.model),
                limit,
                needed,
                blocks,
                max(1, (blocks - 1) // each),
            )
        return super().initialize_from_config(kv_cache_config)


def _is_on(tensor: Any) -> bool:
    return bool(tensor.device.type == DEVICE_TYPE)


def _tensors(caches: Iterable[Any]) -> Iterator[Any]:
    """Those on the device, of which a layer's cache may be one or a tuple, with gaps."""
    for cache in caches:
        if isinstance(cache, tuple | list):
            yield from _tensors(cache)
        elif cache is not None and _is_on(cache):
            yield cache


def _storage_bytes(tensors: Iterable[Any]) -> int:
    """What they take together: tensors may be parts of one piece of memory."""
    pieces = {
        storage._cdata: storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
    }
    return sum(pieces.values())
