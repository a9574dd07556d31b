"""What this project uses of objects that vLLM gives us: no import or call shows it.

One line each: a dotted name, with the parameters that we pass, if it is called. Modules with `|`
between them before a name: it is in one of these, by version. `MODULE says NAME`: code of the
module sets or reads that attribute, of an object whose class does not show it. `since 0.32` and
`until 0.31` limit the versions that are meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CLI_ARGS = "|".join(
    f"vllm.entrypoints.{place}.cli_args" for place in ("common", "launchers", "openai")
)

LAUNCH = "handshake_address=, executor_class=, log_stats="

TEXT = f"""
# host.engine: the engine that is stepped from outside
vllm.v1.engine.core.EngineCore.__init__(config, executor, log_stats, callback, is_finished_set)
vllm.v1.engine.core.EngineCoreProc.__init__(vllm_config=, local_client=, {LAUNCH})
vllm.v1.engine.core.EngineCoreProc.process_input_queue_block
vllm.v1.engine.core.EngineCoreProc.input_queue
vllm.v1.engine.core.EngineCoreProc.aborts_queue
vllm.v1.engine.core.EngineCoreProc.output_thread
vllm.v1.engine.core.EngineCoreProc._process_input_queue()
vllm.v1.engine.core.EngineCoreProc._process_engine_step()
vllm.v1.engine.core.EngineCoreProc._handle_client_request(kind, request)
vllm.v1.engine.core.EngineCoreProc._send_error_outputs_to_client(request_ids, client_index)
vllm.v1.engine.core.EngineCoreProc._send_abort_outputs(aborted)
vllm.v1.engine.core.EngineCoreProc._notify_idle_state_callbacks()
vllm.v1.engine.core.EngineCoreProc.pause_scheduler(mode=, clear_cache=)
vllm.v1.engine.core.EngineCoreProc.resume_scheduler()
vllm.v1.engine.core.EngineCoreProc.collective_rpc(method)
vllm.v1.engine.core.EngineCoreProc.remove_lora(lora_id)
vllm.v1.engine.core.EngineCoreProc._reset_caches()
vllm.v1.engine.core.EngineCoreProc.set_weight_version(version) since 0.32
vllm.v1.engine.core.EngineCore.model_executor
vllm.v1.engine.core.EngineCore.scheduler
vllm.v1.engine.core.EngineCore.structured_output_manager
vllm.v1.engine.core.EngineCore.request_block_hasher
vllm.v1.engine.core.EngineCore.available_gpu_memory_for_kv_cache
vllm.v1.structured_output.StructuredOutputManager.clear_backend()
vllm.v1.structured_output.StructuredOutputManager.executor
vllm.v1.structured_output.StructuredOutputManager.backend
vllm.v1.structured_output.backend_xgrammar.XgrammarBackend.compile_grammar(kind, text)
vllm.v1.structured_output.backend_xgrammar.compile_regex_with_timeout(compile, pattern)
vllm.v1.structured_output.backend_xgrammar says compiler
vllm.v1.structured_output.backend_guidance.llguidance
vllm.sampling_params.StructuredOutputsParams._backend
vllm.v1.engine.async_llm says vllm_config
vllm.sampling_params.SamplingParams.structured_outputs
vllm.sampling_params.SamplingParams.extra_args
vllm.v1.structured_output.request.StructuredOutputRequest._grammar
vllm.v1.request.Request.structured_output_request
vllm.v1.engine.core.EngineCore.abort_requests(request_ids)
vllm.v1.core.sched.scheduler.Scheduler.finish_requests(request_ids, status)
vllm.v1.core.sched.scheduler.Scheduler.shutdown()
vllm.v1.core.sched.scheduler.Scheduler.requests
vllm.v1.core.sched.scheduler.Scheduler.waiting
vllm.v1.core.sched.request_queue.RequestQueue.remove_requests(requests)
vllm.v1.core.sched.request_queue.RequestQueue.prepend_request(request)

# host.executor, host.teardown, host.cpu_worker: one of several workers of a process
vllm.v1.executor.abstract.Executor.is_sleeping
vllm.v1.executor.abstract.Executor.sleep(level)
vllm.v1.executor.abstract.Executor.wake_up()
vllm.v1.executor.abstract.Executor.determine_available_memory()
vllm.v1.executor.abstract.Executor.initialize_from_config(kv_cache_configs)
vllm.v1.executor.uniproc_executor.UniProcExecutor.driver_worker
vllm.v1.executor.uniproc_executor.UniProcExecutor._distributed_args()
vllm.v1.worker.cpu_worker.CPUWorker.compile_or_warm_up_model()
vllm.v1.worker.cpu_worker.CPUWorker.determine_available_memory()
vllm.v1.worker.cpu_worker.CPUWorker._maybe_get_memory_pool_context(tag)
vllm.v1.worker.worker_base.WorkerWrapperBase.worker
vllm.v1.worker.gpu_worker.Worker.profiler
vllm.v1.worker.gpu_worker.Worker.weight_transfer_engine
vllm.v1.worker.gpu_worker.Worker.elastic_ep_executor
vllm.v1.executor.multiproc_executor.MultiprocExecutor._finalizer
vllm.v1.worker.cpu_worker.CPUWorker.model_runner
vllm.v1.worker.cpu_model_runner.CPUModelRunner.warming_up_model() until 0.29
vllm.v1.worker.cpu_worker.CPUWorker._should_warm_up_model() since 0.30
vllm.v1.worker.gpu_model_runner.GPUModelRunner.model
vllm.v1.worker.gpu_model_runner.GPUModelRunner.drafter

# host.cuda_hosting: a GPU worker that sleeps by itself
vllm.v1.worker.gpu_worker.Worker.init_device()
vllm.v1.worker.gpu_worker.Worker._maybe_get_memory_pool_context(tag)
vllm.v1.worker.gpu_worker.Worker.shutdown()
vllm.v1.worker.gpu_worker.Worker.reload_weights(weights)
vllm.v1.worker.gpu_worker.Worker.reset_weights() since 0.32
vllm.v1.worker.gpu_worker.Worker.sleep(level)
vllm.v1.worker.gpu_worker.Worker.wake_up(tags)
vllm.v1.worker.gpu_worker.Worker.model_runner
vllm.v1.worker.worker_base.WorkerBase.cache_config
vllm.v1.worker.worker_base.WorkerBase.lora_config
vllm.v1.worker.worker_base.WorkerBase.parallel_config
vllm.v1.worker.worker_base.WorkerBase.vllm_config
vllm.v1.worker.gpu_model_runner.GPUModelRunner.kv_caches
vllm.v1.worker.gpu.model_runner.GPUModelRunner.kv_caches
vllm.v1.worker.gpu.model_runner.GPUModelRunner.model
vllm.v1.worker.gpu.model_runner.GPUModelRunner.cudagraph_manager
vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.graphs
vllm.compilation.cuda_graph.CUDAGraphWrapper.clear_all_graphs()
vllm.compilation.breakable_cudagraph.BreakableCUDAGraphWrapper.clear_all_graphs()
vllm.config.ModelConfig.enable_sleep_mode
vllm.config.ModelConfig.enable_cumem_allocator since 0.29
vllm.platforms.interface.Platform.is_cuda()

# engines: model_frontend, frontend, stamps, vllm_canary: the client of an engine
vllm.v1.engine.async_llm.AsyncLLM.engine_core
vllm.v1.engine.async_llm.AsyncLLM._run_output_handler()
vllm.v1.engine.async_llm.AsyncLLM.output_handler
vllm.v1.engine.async_llm.AsyncLLM.add_lora(lora_request)
vllm.v1.engine.async_llm.AsyncLLM.generate(prompt, sampling_params, request_id)
vllm.v1.engine.async_llm.AsyncLLM.encode(prompt, pooling_params, request_id)
vllm.v1.engine.async_llm.AsyncLLM.get_supported_tasks()
vllm.v1.engine.async_llm.AsyncLLM.add_request(request_id, prompt, params)
vllm.v1.engine.async_llm.AsyncLLM.input_processor
vllm.v1.engine.input_processor.InputProcessor._validate_params(params, supported_tasks)
vllm.v1.engine.input_processor.InputProcessor.structured_outputs_config
vllm.v1.engine.core_client.MPClient.input_socket
vllm.v1.engine.core_client.MPClient.resources
vllm.v1.engine.core_client.BackgroundResources.output_socket
vllm.v1.engine.core_client.AsyncMPClient._ensure_output_queue_task()
vllm.v1.engine.async_llm.AsyncLLM._run_output_handler()
vllm.v1.engine.async_llm.AsyncLLM.output_processor
vllm.v1.engine.output_processor.OutputProcessor.add_request(request, prompt, parent_req)
vllm.v1.engine.output_processor.OutputProcessor.parent_requests
vllm.v1.engine.parallel_sampling.ParentRequest.child_requests
vllm.v1.engine.async_llm.AsyncLLM.abort(request_id, internal=)
vllm.utils.async_utils.merge_async_iterators
vllm.v1.engine.core_client.AsyncMPClient.add_request_async(request)
vllm.v1.engine.core_client.AsyncMPClient.abort_requests_async(request_ids)
vllm.v1.engine.core_client.AsyncMPClient.get_output_async()
vllm.v1.engine.EngineCoreOutputs.outputs
vllm.v1.engine.EngineCoreOutputs.weight_version since 0.32
vllm.v1.engine.EngineCoreRequest.cache_salt
vllm.v1.engine.EngineCoreOutput.request_id
vllm.v1.engine.EngineCoreOutput.new_token_ids
vllm.v1.engine.EngineCoreOutput.finish_reason
vllm.v1.engine.EngineCoreRequest.prompt_token_ids
vllm.v1.engine.EngineCoreRequest.sampling_params
vllm.v1.engine.EngineCoreRequest.lora_request
vllm.v1.engine.EngineCoreRequest.client_index
vllm.entrypoints.openai.models.serving.OpenAIServingModels.lora_requests
vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.response_store
vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.msg_store
vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.event_store
vllm.entrypoints.openai.responses.serving.OpenAIServingResponses.background_tasks
vllm.v1.metrics.loggers.PrometheusStatLogger._gauge_cls
vllm.v1.metrics.loggers.PrometheusStatLogger._counter_cls
vllm.v1.metrics.loggers.PrometheusStatLogger._histogram_cls

# launch.needs, launch, check: a model's configuration
vllm.config.VllmConfig.model_config
vllm.config.VllmConfig.parallel_config
vllm.config.VllmConfig.scheduler_config
vllm.config.VllmConfig.cache_config
vllm.config.VllmConfig.lora_config
vllm.config.VllmConfig.load_config
vllm.config.VllmConfig.speculative_config
vllm.config.VllmConfig.weight_transfer_config
vllm.config.VllmConfig.compilation_config
vllm.config.ModelConfig.runner_type
vllm.config.ModelConfig.convert_type
vllm.config.ModelConfig.score_type
vllm.config.ModelConfig.attn_type
vllm.config.ModelConfig.has_inner_state
vllm.config.ModelConfig.is_moe
vllm.config.ModelConfig._model_info
vllm.config.ModelConfig.registry
vllm.config.ModelConfig.architecture
vllm.model_executor.models.registry._ModelInfo.supports_transcription
vllm.model_executor.models.registry._ModelInfo.supports_transcription_only
vllm.model_executor.models.registry._ModelInfo.is_pooling_model
vllm.config.ModelConfig.enforce_eager
vllm.config.ModelConfig.max_model_len
vllm.config.ModelConfig.max_logprobs
vllm.config.ModelConfig.revision
vllm.config.ModelConfig.dtype
vllm.config.ModelConfig.hf_text_config
vllm.config.ModelConfig.use_mla
vllm.config.ModelConfig.is_hybrid
vllm.config.ModelConfig.is_attention_free
vllm.config.ModelConfig.is_multimodal_model
vllm.config.ModelConfig.get_num_layers(parallel_config)
vllm.config.ModelConfig.get_num_kv_heads(parallel_config)
vllm.config.ModelConfig.get_num_attention_heads(parallel_config)
vllm.config.ModelConfig.get_head_size()
vllm.config.ModelConfig.get_hidden_size()
vllm.config.ModelConfig.get_vocab_size()
vllm.config.ModelConfig.get_num_experts()
vllm.config.CacheConfig.block_size
vllm.config.CacheConfig.cache_dtype
vllm.config.CacheConfig.kv_cache_memory_bytes
vllm.config.CacheConfig.gpu_memory_utilization
vllm.config.SchedulerConfig.max_num_seqs
vllm.config.ParallelConfig.enable_eplb
vllm.config.ParallelConfig.worker_cls
vllm.config.ParallelConfig.world_size
vllm.config.ParallelConfig.local_world_size
vllm.config.ParallelConfig.tensor_parallel_size
vllm.config.ParallelConfig.pipeline_parallel_size
vllm.config.ParallelConfig.data_parallel_index
vllm.config.ParallelConfig.rank
vllm.config.CompilationConfig.mode
vllm.config.CompilationConfig.cudagraph_mode
vllm.config.CompilationConfig.inductor_compile_config
vllm.config.CompilationConfig.static_forward_context
vllm.config.CompilationConfig.dynamic_shapes_config
vllm.config.lora.LoRAConfig.max_loras
vllm.config.lora.LoRAConfig.max_cpu_loras
vllm.config.lora.LoRAConfig.max_lora_rank
vllm.config.lora.LoRAConfig.lora_dtype
vllm.config.lora.LoRAConfig.default_mm_loras

# host.kv_cache, launch.inspection, launch.tasks: what is known before a load
vllm.config.ModelConfig.runner_type
vllm.config.ModelConfig.architectures
vllm.config.ModelConfig.is_encoder_decoder
vllm.config.ModelConfig.has_noops
vllm.config.ModelConfig.original_max_model_len
vllm.config.ModelConfig.get_layers_start_end_indices(parallel_config)
vllm.config.ModelConfig.get_total_num_hidden_layers()
vllm.config.CacheConfig.user_specified_block_size
vllm.config.CacheConfig.num_gpu_blocks_override
vllm.config.CacheConfig.kv_cache_layout since 0.30
vllm.config.CacheConfig.sliding_window
vllm.config.CacheConfig.mamba_block_size
vllm.config.CacheConfig.mamba_page_size_padded
vllm.config.CacheConfig.mamba_cache_mode
vllm.v1.kv_cache_interface.KVCacheConfig.num_blocks
vllm.v1.kv_cache_interface.KVCacheConfig.kv_cache_tensors
vllm.v1.kv_cache_interface.MambaSpec.num_prefill_checkpoint_blocks since 0.29
vllm.v1.attention.backend.AttentionBackend.get_preferred_block_size(default_block_size) since 0.33
vllm.platforms.interface.Platform._align_hybrid_block_size(vllm_config, backend_cls)
vllm.model_executor.models.registry._run_in_subprocess(fn)

# flags, listen, server: flags that are read by name
vllm.engine.arg_utils.EngineArgs.served_model_name
vllm.engine.arg_utils.EngineArgs.disable_log_stats
vllm.engine.arg_utils.AsyncEngineArgs.enable_log_requests
vllm.engine.arg_utils.EngineArgs.distributed_executor_backend
vllm.engine.arg_utils.EngineArgs.data_parallel_size
vllm.engine.arg_utils.EngineArgs.mm_processor_cache_gb
{CLI_ARGS} BaseFrontendArgs.chat_template
{CLI_ARGS} BaseFrontendArgs.default_chat_template_kwargs
{CLI_ARGS} BaseFrontendArgs.tool_call_parser
{CLI_ARGS} BaseFrontendArgs.tool_parser_plugin
{CLI_ARGS} FrontendArgs.host
{CLI_ARGS} FrontendArgs.port
{CLI_ARGS} FrontendArgs.uds
{CLI_ARGS} FrontendArgs.uvicorn_log_level
{CLI_ARGS} FrontendArgs.disable_uvicorn_access_log
{CLI_ARGS} FrontendArgs.allow_credentials
{CLI_ARGS} FrontendArgs.allowed_origins
{CLI_ARGS} FrontendArgs.allowed_methods
{CLI_ARGS} FrontendArgs.allowed_headers
{CLI_ARGS} FrontendArgs.api_key
{CLI_ARGS} FrontendArgs.ssl_keyfile
{CLI_ARGS} FrontendArgs.ssl_certfile
{CLI_ARGS} FrontendArgs.ssl_ca_certs
{CLI_ARGS} FrontendArgs.ssl_cert_reqs
{CLI_ARGS} FrontendArgs.ssl_ciphers
{CLI_ARGS} FrontendArgs.enable_ssl_refresh
{CLI_ARGS} FrontendArgs.root_path
{CLI_ARGS} FrontendArgs.h11_max_incomplete_event_size
{CLI_ARGS} FrontendArgs.h11_max_header_count
{CLI_ARGS} FrontendArgs.log_config_file until 0.29
vllm.engine.arg_utils.AsyncEngineArgs.logging_config since 0.32
vllm.config.logging.LoggingConfig.pylogging_config_file since 0.32
{CLI_ARGS} BaseFrontendArgs.enable_tokenizer_info_endpoint

# host.compiled, host.weights, host.lora: what a loaded model is made of
vllm.compilation.decorators says aot_compiled_fn
vllm.compilation.decorators says do_not_compile
vllm._custom_ops.CPUDNNLGEMMHandler.handler_tensor
vllm._custom_ops.CPUDNNLGEMMHandler.dtor
vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.token_lora_indices
vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.sampler_indices
vllm.platforms.interface.Platform.get_punica_wrapper()
vllm.platforms.interface.Platform.register_triton_kernel_overrides() since 0.30
vllm.platforms.interface.Platform.is_cpu()
vllm.platforms.interface.Platform.is_cuda_alike()
vllm.platforms.interface.Platform.device_type
vllm.platforms.interface.Platform.simple_compile_backend
vllm.v1.sample.ops.logprobs says simple_compile_backend
vllm.model_executor.layers.utils says cpu_linear
"""

_LINE = re.compile(
    r"(?:(?P<said_in>[\w.]+) says |(?P<modules>\S+ ))?(?P<name>[\w.]+)"
    r"(?P<call>\((?P<parameters>[^)]*)\))?"
    r"(?: since (?P<since>[\d.]+))?(?: until (?P<until>[\d.]+))?"
)


@dataclass(frozen=True, slots=True)
class Seam:
    """One thing that we rely on."""

    names: tuple[str, ...]
    """Where it may be; one of them has to be there."""
    positional: tuple[str, ...] | None
    """Parameters that we pass by position, under names of ours; None: it is not called."""
    keywords: tuple[str, ...]
    since: tuple[int, ...]
    until: tuple[int, ...]
    said_in: str = ""
    """The module whose code has the name; empty: the name is looked up."""

    def is_meant_for(self, version: tuple[int, ...]) -> bool:
        return self.since <= version[:2] and (not self.until or version[:2] <= self.until)

    def __str__(self) -> str:
        return " or ".join(self.names)


def seams(text: str = TEXT) -> tuple[Seam, ...]:
    """Return the seams. Raises `ValueError` for a line that cannot be read."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(_seam(line) for line in lines if line and not line.startswith("#"))


def _seam(line: str) -> Seam:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"this line names no seam: {line!r}")
    modules = (match["modules"] or "").strip()
    prefixes = [f"{module}." for module in modules.split("|")] if modules else [""]
    passed = [p.strip() for p in (match["parameters"] or "").split(",") if p.strip()]
    return Seam(
        names=tuple(prefix + match["name"] for prefix in prefixes),
        positional=None if match["call"] is None else tuple(p for p in passed if p[-1] != "="),
        keywords=tuple(p[:-1] for p in passed if p[-1] == "="),
        since=numbers(match["since"]),
        until=numbers(match["until"]),
        said_in=match["said_in"] or "",
    )


def numbers(version: str | None) -> tuple[int, ...]:
    """Return `0.32.1rc1` as `(0, 32, 1)`; nothing as `()`."""
    return tuple(int(part) for part in re.findall(r"\d+", version or "")[:3])
