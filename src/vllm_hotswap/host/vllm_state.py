"""What vLLM keeps for a whole process, and which engines share it here. Checked on vLLM 0.32.0.

vLLM is written for one engine per process, so a load sets module globals, class attributes and
environment variables. `STATE` lists those that a load, a step or an unload changes, with what is
done about each; `host.state` does it. `docs/internals/vllm-state.md` is made from this list, and a
test compares it with what the installed vLLM really changes.

`PLUGINS` are packages that are not vLLM's. Their state is only looked for if they have been
imported already. A platform's plugin has been, before anything is loaded.

Input threads read requests for any engine at any time, and so read some of this state while another
engine's values may be in place. They do not read the root of prefix hashes (`NONE_HASH`): each
engine has a hasher with its own (`host.hashing`). They may read another engine's cache of
variables (`vllm.envs`), which has the same values, except for variables of one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from types import MappingProxyType

from vllm_hotswap.host.vllm_versions import numbers

PLUGINS = frozenset(["vllm_gaudi"])


class Owner(Enum):
    """Which engines share a piece of state."""

    ENGINE = "engine"
    """Each engine has its own, as in a process of its own: put in place when it is worked with."""
    KIND = "kind"
    """Engines of one kind share it: what the first of them has made serves the others."""
    PROCESS = "process"
    """All engines share it, on purpose."""


OWNER_NAMES = MappingProxyType(
    {Owner.ENGINE: "each engine", Owner.KIND: "each kind of model", Owner.PROCESS: "all"}
)


@dataclass(frozen=True, slots=True)
class State:
    """One piece of process-wide state.

    Attributes:
        place: `module:attribute.path`, or `os:environ[NAME]`. A `*` in a path stands for every
            value of a dictionary, or, where the state is shared, for any text.
        owner: which engines share it.
        reason: what it is, and why it belongs there.
        since: the first version of vLLM that has it, of those that were examined.
    """

    place: str
    owner: Owner
    reason: str
    since: str = ""

    @property
    def package(self) -> str:
        """The package that has it, such as `vllm`."""
        return self.place.partition(":")[0].partition(".")[0]

    @property
    def is_moved_attribute(self) -> bool:
        """Whether it is moved with engines, and is not a variable, which need not be set."""
        return self.owner is not Owner.PROCESS and not self.place.startswith("os:")

    def is_in(self, version: str) -> bool:
        """Whether a version of vLLM, such as `0.32.0`, should have it."""
        return numbers(version) >= numbers(self.since)


def _of(owner: Owner, module: str, names: str, reason: str, since: str = "") -> Iterator[State]:
    for name in names.split():
        yield State(f"{module}:{name}", owner, reason, since)


def _engine(module: str, names: str, reason: str, since: str = "") -> Iterator[State]:
    return _of(Owner.ENGINE, module, names, reason, since)


def _shared(module: str, names: str, reason: str, since: str = "") -> Iterator[State]:
    return _of(Owner.PROCESS, module, names, reason, since)


GROUPS = (
    "parallel groups, each of this process alone. Models of mixtures of experts have more of "
    "them than dense ones; a set per engine would cost 14 sockets and 40 threads"
)
KERNELS = "kernels that the model's configuration has chosen"
POINTERS = (
    "where weights of adapters lie, in tensors on the device, by those addresses; if kept, they "
    "would hold memory of unloaded models"
)
ROOT = (
    "where the hashes of the model's prefix cache begin; drawn anew at each load if the hash "
    "is not cryptographic, so another load would in effect empty the cache"
)
MANAGERS = "which class manages which kind of KV memory; the same for all models of a platform"


STATE: tuple[State, ...] = (
    *_of(
        Owner.KIND,
        "vllm.distributed.parallel_state",
        "_TP _DCP _PCP _PP _DP _EP _EPLB",
        GROUPS,
    ),
    *_of(Owner.KIND, "vllm.distributed.parallel_state", "_ETP _ENGRAM_DP", GROUPS, "0.32"),
    *_engine(
        "vllm.distributed.parallel_state",
        "_ENABLE_CUSTOM_ALL_REDUCE",
        "a setting of the model",
    ),
    *_engine(
        "vllm.distributed.kv_transfer.kv_transfer_state",
        "_KV_CONNECTOR_AGENT",
        "the connector of the model that transfers KV memory",
    ),
    *_engine(
        "vllm.distributed.ec_transfer.ec_transfer_state",
        "_EC_CONNECTOR_AGENT",
        "the connector of the model that transfers encoder outputs",
    ),
    *_engine(
        "vllm.envs",
        "__getattr__",
        "the cache of environment variables, which is filled at the end of each load",
    ),
    *_engine(
        "vllm.model_executor.layers.rotary_embedding",
        "_ROPE_DICT",
        "rotary layers by shape; a shared one would have to outlive the models that use it, and "
        "would be in the memory of one that may sleep",
    ),
    *_engine("vllm.lora.ops.triton_ops.utils", "_LORA_A_PTR_DICT _LORA_B_PTR_DICT", POINTERS),
    *_engine("vllm.lora.ops.triton_ops.fused_moe_lora_op", "_LORA_PTR_DICT", POINTERS),
    *_engine("vllm.lora.ops.triton_ops.fused_moe_lora_fp8_op", "_LORA_PTR_DICT", POINTERS),
    *_engine(
        "vllm.lora.ops.triton_ops.lora_shrink_fp8_op", "_SHRINK_LORA_SCALE_PTR_DICT", POINTERS
    ),
    *_engine(
        "vllm.lora.ops.triton_ops.lora_expand_fp8_op", "_EXPAND_LORA_SCALE_PTR_DICT", POINTERS
    ),
    *_engine(
        "vllm.model_executor.layers.mamba.ops.ssu_dispatch",
        "_mamba_ssu_backend",
        KERNELS,
    ),
    *_engine(
        "vllm.model_executor.layers.mamba.ops.ssu_dispatch",
        "_flashinfer_replayssm_kernel",
        KERNELS,
        "0.32",
    ),
    *_engine(
        "vllm.model_executor.layers.attention.mm_encoder_attention",
        "_fp8_scale_save_path _fp8_scale_save_margin",
        "where the model's scales are written",
    ),
    *_engine(
        "vllm.model_executor.offloader.base",
        "_instance",
        "what moves the model's weights to host memory and back, at each step",
    ),
    *_engine(
        "vllm.ir.op",
        "_ENABLE_TORCH_WRAP IrOp.registry.*._priority_impls",
        "how operations are dispatched; depends on whether and how the model is compiled",
    ),
    *_engine(
        "vllm.v1.worker.workspace",
        "_manager",
        "scratch memory of the model; its warm-up finds the size and locks it",
    ),
    *_engine(
        "vllm.v1.worker.gpu.buffer_utils",
        "_DEFAULT_MAX_CONCURRENCY",
        "how many steps the model may have in flight",
    ),
    *_engine(
        "vllm.v1.worker.ubatching",
        "_NUM_UBATCHES _CURRENT_CONTEXTS _THREAD_ID_TO_CONTEXT",
        "the parts of a batch that the model works on at once",
    ),
    *_engine("vllm.v1.core.kv_cache_utils", "NONE_HASH", ROOT),
    *_engine("vllm.v1.core.kv_cache_utils", "_NONE_HASH_SEED", ROOT, "0.29"),
    *_engine(
        "vllm.compilation.cuda_graph",
        "CUDAGraphWrapper._all_instances",
        "the model's graphs, which vLLM clears all at once",
    ),
    *_engine(
        "vllm.compilation.breakable_cudagraph",
        "BreakableCUDAGraphWrapper._all_instances",
        "the model's graphs, which vLLM clears all at once",
    ),
    *_engine(
        "vllm.platforms",
        "current_platform.__class__._global_graph_pool",
        "memory of the model's graphs, which is freed with them",
    ),
    *_engine(
        "vllm.compilation.monitor",
        "cudagraph_capturing_enabled torch_compile_start_time",
        "whether the model may still capture graphs",
    ),
    *_engine(
        "vllm.utils.jit_monitor",
        "_active _mode _verbose",
        "whether kernels may still be compiled; a load after another one must not be blamed for it",
    ),
    *_engine(
        "vllm.utils.gpu_sync_debug",
        "_sync_check_enabled",
        "whether a step may wait for the device (`VLLM_GPU_SYNC_CHECK`); a load always may",
    ),
    *_engine(
        "os",
        "environ[TORCHINDUCTOR_CACHE_DIR] environ[TRITON_CACHE_DIR] environ[VLLM_DIST_IDENT]",
        "the model's folder of compiled code; the name of its process group",
    ),
    *_engine(
        "vllm.compilation.compiler_interface",
        "_last_inductor_triton_cache_dir",
        "belongs to the folder of compiled code",
        "0.32",
    ),
    *_engine(
        "vllm_gaudi.extension.runtime",
        "RUNTIME_CONFIG",
        "the plugin's configuration, which the type of the model decides",
    ),
    *_engine(
        "vllm_gaudi.extension.environment",
        "_VLLM_VALUES",
        "the properties of the model that decide the plugin's configuration",
    ),
    *_engine(
        "vllm_gaudi.extension.ops",
        "USING_INC",
        "whether attention may take a mask and a causal flag together; `QUANT_CONFIG` decides it",
    ),
    *_engine(
        "vllm_gaudi.extension.bucketing.common",
        "HPUBucketingManager._active_instance",
        "the model's buckets",
    ),
    *_engine(
        "os",
        "environ[VLLM_USE_HYBRID_CACHE] environ[VLLM_USE_NAIVE_MAMBA_CACHE_SHARING] "
        "environ[VLLM_COMPACT_GDN]",
        "how the Gaudi plugin lays out the memory of a hybrid model; if shared, the first "
        "such model would decide",
    ),
    *_shared(
        "vllm.distributed.parallel_state",
        "_WORLD _NODE_COUNT _INNER_DP_WORLD",
        "this process alone, whatever the model; torch has one default group per process",
    ),
    *_shared(
        "vllm.distributed.parallel_state",
        "_groups _group_name_counter",
        "names of groups; there is one set of groups for each kind of model",
    ),
    *_shared(
        "vllm.ir.ops",
        "*",
        "the operations themselves; how each is dispatched is above",
    ),
    *_shared(
        "vllm.ir.op",
        "IrOp.registry",
        "the operations themselves; how each is dispatched is above",
    ),
    *_shared(
        "vllm.kernels.*",
        "rms_norm fused_add_rms_norm gelu_and_mul_sparse_triton",
        "the operations themselves; how each is dispatched is above",
    ),
    *_shared(
        "vllm.*",
        "current_platform _current_platform",
        "what this machine is",
    ),
    *_shared(
        "vllm.platforms.*",
        "*._global_graph_pool",
        "listed above as the platform's, under another name",
    ),
    *_shared(
        "vllm.utils.import_utils",
        "*",
        "what is installed",
    ),
    *_shared(
        "vllm.utils.platform_utils",
        "*",
        "what this machine is",
    ),
    *_shared(
        "vllm.utils.cpu_resource_utils",
        "*",
        "what this machine is",
    ),
    *_shared(
        "vllm.utils.func_utils",
        "_supports_kw",
        "the parameters of functions; depends only on the functions",
    ),
    *_shared(
        "vllm.logger",
        "_print_*_once",
        "what has been logged once",
    ),
    *_shared(
        "vllm.compilation.counter",
        "compilation_counter",
        "counts that nothing depends on",
    ),
    *_shared(
        "vllm.transformers_utils.*",
        "*",
        "what is in a checkpoint, by its name and revision",
    ),
    *_shared(
        "vllm.model_executor.models.registry",
        "*",
        "classes of models, by their architecture",
    ),
    *_shared(
        "vllm.v1.attention.selector",
        "_cached_get_attn_backend _cached_get_mamba_attn_backend",
        "classes, by everything that decides the choice",
    ),
    *_shared(
        "vllm.model_executor.layers.attention.*",
        "create_*_backend",
        "classes that are derived from a class; depend only on that class",
    ),
    *_shared(
        "vllm.config.vllm",
        "get_cached_compilation_config",
        "vLLM empties it whenever the current configuration changes",
    ),
    *_shared(
        "vllm.triton_utils.dispatcher",
        "_registry",
        "kernels that the platform replaces once for all models",
        "0.32",
    ),
    *_shared("vllm.v1.kv_cache_spec_registry", "_REGISTRY_KVCACHESPEC_LIST", MANAGERS),
    *_shared("vllm.v1.kv_cache_spec_registry", "_REGISTRY_ROLE_MANAGERS", MANAGERS, "0.32"),
    *_shared(
        "vllm.config.cache",
        "_layout_from_name",
        "depends on its arguments alone",
        "0.29",
    ),
    *_shared(
        "vllm.config.vllm",
        "default_breakable_cudagraph_architectures",
        "depends only on the version of vLLM",
        "0.29",
    ),
    *_shared(
        "vllm.logger",
        "_last_configured_logging_config",
        "logging, which is configured once",
        "0.32",
    ),
    *_shared(
        "vllm.plugins",
        "plugins_loaded",
        "plugins, which are loaded once",
    ),
    *_shared(
        "vllm.model_executor.layers.activation",
        "_ACTIVATION_REGISTRY",
        "activation functions, which have neither weights nor state",
    ),
    *_shared(
        "vllm.model_executor.layers.mamba.mamba_utils",
        "get_conv_state_layout",
        "an environment variable of the server (`VLLM_SSM_CONV_STATE_LAYOUT`)",
    ),
    *_shared(
        "vllm.model_executor.model_loader.reload.layerwise",
        "LAYERWISE_INFO",
        "by layer; freed with the layer",
    ),
    *_shared(
        "vllm.model_executor.model_loader.utils",
        "_MODEL_ARCH_BY_HASH",
        "classes of models, by a hash of the configuration",
    ),
    *_shared(
        "vllm.model_executor.warmup.jit_warmup_triton_helper",
        "_launch_binding_plan",
        "depends on its arguments alone",
        "0.32",
    ),
    *_shared(
        "vllm.v1.worker.block_table",
        "_COMPUTE_SLOT_MAPPING_KERNEL",
        "a kernel that holds nothing of a model",
        "0.29",
    ),
    *_shared(
        "os",
        "environ[LOCAL_WORLD_SIZE] environ[NUMEXPR_MAX_THREADS] "
        "environ[TORCHINDUCTOR_CPP_DYNAMIC_THREADS] environ[VLLM_DISABLE_SHARED_EXPERTS_STREAM] "
        "environ[VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME]",
        "set by the CPU platform when a configuration is made, which the host does not do",
    ),
    *_shared(
        "logging",
        "root",
        "logging, which is configured once",
    ),
    *_shared(
        "torch",
        "set_num_threads",
        "the CPU worker replaces it by a function that does nothing: the threads are bound by then",
    ),
)


def of_owner(owner: Owner) -> Iterator[State]:
    return (state for state in STATE if state.owner is owner)


def is_known(place: str) -> bool:
    """Whether `place`, in the notation of `State`, is listed."""
    return any(fnmatchcase(place, _pattern(state.place)) for state in STATE)


def _pattern(place: str) -> str:
    return place.replace("[", "[[]")


def table() -> str:
    """Return the list as a table in Markdown, by owner."""
    rows = ["| state | belongs to | what it is, and why |", "|---|---|---|"]
    for owner in Owner:
        rows += [f"| `{s.place}` | {OWNER_NAMES[owner]} | {s.reason} |" for s in of_owner(owner)]
    return "\n".join(rows) + "\n"
