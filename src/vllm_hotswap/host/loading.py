"""What the engine host needs of vLLM around a load. Checked on vLLM 0.32.0.

Relies on: `Executor.get_class`, `maybe_register_config_serialize_by_value`,
`register_triton_kernel_overrides`.
"""

from __future__ import annotations

from typing import Any

from vllm_hotswap.host import gaudi


def executor_class(config: Any) -> type[Any]:
    from vllm.v1.executor.abstract import Executor

    return Executor.get_class(config)  # type: ignore[no-any-return]


def prepare_host() -> None:
    """Import what loads and steps need, so that no load waits for an import."""
    import vllm_hotswap.host.uncompiled  # before vLLM's modules

    # isort: split
    from vllm.model_executor.model_loader import get_model  # noqa: F401
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
    from vllm.v1.core.sched import scheduler  # noqa: F401

    import vllm_hotswap.host.compiled
    import vllm_hotswap.host.engine
    import vllm_hotswap.host.executor

    if current_platform.is_cpu():
        import vllm_hotswap.host.cpu_worker
    elif current_platform.is_cuda():
        import vllm_hotswap.host.cuda_worker
    elif current_platform.is_cuda_alike():
        import vllm.v1.worker.gpu_worker  # noqa: F401
    if gaudi.prepare(current_platform):
        import vllm_hotswap.host.gaudi_worker  # noqa: F401
    maybe_register_config_serialize_by_value()
    _register_kernels_once(current_platform)


def _register_kernels_once(platform: Any) -> None:
    """Let the platform replace its Triton kernels now, and not again at every load.

    vLLM does it for each worker that it makes: a scan of all modules (0.3 s to 0.5 s were
    measured) that would wrap what it has wrapped already. The mark is set on this process's
    platform object, not on its class.
    """
    if hasattr(type(platform), "register_triton_kernel_overrides"):  # of the object vLLM says None
        platform.register_triton_kernel_overrides()
        platform.register_triton_kernel_overrides = lambda: None
