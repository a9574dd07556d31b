"""vLLM's GPU worker, one of several in a process, and able to sleep by itself.

Named by its qualified name in `parallel_config.worker_cls`. What it does differently is in
`host.cuda_hosting`.
"""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_hotswap.host.cuda_hosting import HostedOnCuda


class HostedCudaWorker(HostedOnCuda, Worker):  # type: ignore[misc]  # vLLM's types stop here
    """A GPU worker that shares its process with others."""


class WakefulCudaWorker(HostedCudaWorker):
    """A worker without memory pools, which cannot sleep; used where pools do not work."""

    has_pools = False
