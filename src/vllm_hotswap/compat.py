"""Everything that depends on vLLM's version, in one place. Checked on vLLM 0.32.0.

The engine host, the frontend builder and this module are the only ones that import vLLM. What
is relied on here: `make_arg_parser`, `AsyncEngineArgs.from_cli_args`, `create_engine_config`,
`AsyncLLM(client_addresses=...)`, `build_app`, `init_app_state`, `PrometheusStatLogger` and its
class hooks, `vllm.parser.metrics`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from vllm_hotswap.budget import OVERHEAD_BYTES, ModelNeeds
from vllm_hotswap.checkpoint import weight_files_bytes
from vllm_hotswap.devices import device_of
from vllm_hotswap.errors import ConfigError, EngineUnavailable, one_line
from vllm_hotswap.host.messages import SocketPaths

log = logging.getLogger("vllm_hotswap")

WORKER_PROCESS_BYTES = 600 << 20
"""What one worker process of a tensor-parallel model holds besides the model, on a CPU."""


# --- configuration -----------------------------------------------------------------------


def serve_parser(prog: str) -> argparse.ArgumentParser:
    """vLLM's own parser of `vllm serve` flags; errors raise `ConfigError` instead of exiting."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class RaisingParser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM's types stop here
        def error(self, message: str) -> NoReturn:
            raise ConfigError(" ".join(message.split()))

    parser: argparse.ArgumentParser = make_arg_parser(RaisingParser(prog=prog))
    return parser


def engine_config(args: argparse.Namespace) -> Any:
    """The `VllmConfig` of one model, with the engine to be hosted, not launched.

    May start a process that inspects an architecture for the first time on this machine
    (seconds, then cached on disk), so it is called at start-up, never in a switch.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_hotswap.host.executor import MULTIPROC_QUALIFIED_NAME, QUALIFIED_NAME

    engine_args = AsyncEngineArgs.from_cli_args(args)
    single = engine_args.tensor_parallel_size == 1 and engine_args.pipeline_parallel_size == 1
    if engine_args.distributed_executor_backend in (None, "mp"):
        engine_args.distributed_executor_backend = (
            QUALIFIED_NAME if single else MULTIPROC_QUALIFIED_NAME
        )
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    device_of(config).configure(config)
    return config


def validate_serve_args(args: argparse.Namespace) -> None:
    """vLLM's own checks of one model's flags. Raises `ConfigError`."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.tool_parsers import ToolParserManager

    if args.tool_parser_plugin and len(args.tool_parser_plugin) > 3:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin and len(args.reasoning_parser_plugin) > 3:
        from vllm.reasoning import ReasoningParserManager

        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    try:
        validate_parsed_serve_args(args)
    except Exception as error:
        raise ConfigError(one_line(error)) from error
    parsers = ToolParserManager.list_registered()
    if args.tool_call_parser is not None and args.tool_call_parser not in parsers:
        raise ConfigError(
            f"tool_call_parser {args.tool_call_parser!r} is not known; "
            f"known: {', '.join(sorted(parsers))}"
        )


def model_needs(alias: str, config: Any, weights_bytes: int, pinned: bool = False) -> ModelNeeds:
    """What can be known of a model's memory before it is loaded, on one device."""
    model, parallel, device = config.model_config, config.parallel_config, device_of(config)
    per_token = (
        2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size()
        * _kv_dtype_bytes(config)
    )
    # vLLM allocates whole blocks; one more than needed covers rounding and its null block.
    one = per_token * (model.max_model_len + 2 * (config.cache_config.block_size or 128))
    # Latent attention, state-space and sliding-window layers hold something else per token.
    is_plain = not (
        model.use_mla or model.is_hybrid or model.is_attention_free or model.get_sliding_window()
    )
    # The workers of a tensor-parallel model share one CPU's memory, but have a GPU each.
    workers = kv_shares(config)
    explicit = config.cache_config.kv_cache_memory_bytes
    return ModelNeeds(
        alias=alias,
        weights_bytes=weights_bytes if device.is_host_memory else weights_bytes // _ranks(config),
        kv_bytes=None if explicit is None else explicit * workers,
        min_kv_bytes=one * workers if is_plain else 0,
        max_kv_bytes=one * workers * config.scheduler_config.max_num_seqs
        if is_plain
        else sys.maxsize,
        pinned=pinned,
        keeps_weights=device.is_host_memory,
        overhead_bytes=OVERHEAD_BYTES + (WORKER_PROCESS_BYTES * workers if workers > 1 else 0),
    )


def kv_shares(config: Any) -> int:
    """Into how many parts a model's KV memory on its device is divided, one for each worker."""
    return _ranks(config) if device_of(config).is_host_memory else 1


def _ranks(config: Any) -> int:
    parallel = config.parallel_config
    return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size)


def _kv_dtype_bytes(config: Any) -> int:
    dtype = str(config.cache_config.cache_dtype)
    return 1 if "fp8" in dtype or "int8" in dtype else int(config.model_config.dtype.itemsize)


def local_folder(name: str, revision: str | None) -> Path | None:
    """Where a model's files are: the folder itself, or its place in the hub's cache, or None."""
    from huggingface_hub import snapshot_download

    if Path(name).is_absolute():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:  # noqa: BLE001  # whatever it raises, there is a way on
        log.debug("event=not_in_cache model=%s cause=%r", name, error)
        return None


def hub_weights_bytes(name: str, revision: str | None) -> int:
    """Size of a hub model's weight files, from the local cache or the hub's list; 0 if unknown."""
    from huggingface_hub import HfApi

    if folder := local_folder(name, revision):
        return weight_files_bytes({f.name: f.stat().st_size for f in folder.iterdir()})
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=10)
        return weight_files_bytes({f.rfilename: f.size or 0 for f in info.siblings or ()})
    except Exception as error:  # noqa: BLE001  # a size that is not known must not end the start
        log.warning("event=weights_size_unknown model=%s cause=%r", name, one_line(error))
        return 0


# --- frontend ----------------------------------------------------------------------------


def prepare_frontends() -> None:
    """Import what `make_client` and `make_app` need."""
    importlib.import_module("vllm.v1.engine.async_llm")
    importlib.import_module("vllm.entrypoints.launchers.app")
    importlib.import_module("vllm.entrypoints.launchers.api_server.app_state")


def make_client(config: Any, sockets: SocketPaths, args: argparse.Namespace) -> Any:
    """An `AsyncLLM` for an engine that the host has loaded. Blocks until the engine answers."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_hotswap.metrics import shared_stat_logger

    return AsyncLLM(
        vllm_config=config,
        executor_class=executor_class(config),
        log_stats=not args.disable_log_stats,
        log_requests=args.enable_log_requests,
        stat_loggers=[] if args.disable_log_stats else [shared_stat_logger()],
        client_addresses={"input_address": sockets.input, "output_address": sockets.output},
    )


async def make_app(client: Any, args: argparse.Namespace) -> Any:
    """vLLM's complete API server for one engine client, ready to be called."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    return app


def name_in_parser_metrics(alias: str) -> None:
    """Have vLLM's tool parser counter, which keeps one label per process, count for `alias`."""
    from vllm.parser import metrics

    if metrics._model_name is not None:
        metrics._model_name = alias


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Turn vLLM's sign of a dead engine into ours."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineUnavailable("the engine died; see the server's log") from error


# --- engine host -------------------------------------------------------------------------


def executor_class(config: Any) -> type[Any]:
    from vllm.v1.executor.abstract import Executor

    return Executor.get_class(config)  # type: ignore[no-any-return]


def prepare_host() -> None:
    """Import what loads and steps need, so that no load waits for an import."""
    from vllm.model_executor.model_loader import get_model  # noqa: F401
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
    from vllm.v1.core.sched import scheduler  # noqa: F401

    import vllm_hotswap.host.compiled
    import vllm_hotswap.host.engine
    import vllm_hotswap.host.executor  # noqa: F401

    for kind in ("cpu", "gpu") if current_platform.is_cpu() else ("gpu",):
        with contextlib.suppress(ImportError):  # the worker of another platform, perhaps
            importlib.import_module(f"vllm.v1.worker.{kind}_worker")
    maybe_register_config_serialize_by_value()
    _register_kernels_once(current_platform)


def _register_kernels_once(platform: Any) -> None:
    """Let the platform replace its Triton kernels now, and not again at every load.

    vLLM does it for each worker that it makes: a scan of all modules (0.3 s to 0.5 s were
    measured) that would wrap what it has wrapped already. The mark is set on this process's
    platform object, not on its class.
    """
    if hasattr(platform, "register_triton_kernel_overrides"):
        platform.register_triton_kernel_overrides()
        platform.register_triton_kernel_overrides = lambda: None


def unshare_layers() -> None:
    """Have the next model make its own rotary caches, not share those of the model just loaded.

    vLLM keeps them per shape for the whole process; a shared one would have to outlive every
    model that uses it, and on an accelerator would lie in the memory of one that may sleep.
    """
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    _ROPE_DICT.clear()
