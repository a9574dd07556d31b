"""How much KV memory a model can use, in vLLM's own terms. Checked on vLLM 0.32.0.

vLLM describes the KV cache of each layer by a `KVCacheSpec`, puts layers into groups, and knows how
many blocks of each group one sequence of the maximum length takes. A loaded model tells its specs.
Before the first load they are made from its configuration, by the same classes; `limits` then
does the same arithmetic for both.

Relies on: the specs of `vllm.v1.kv_cache_interface`, `get_kv_cache_configs` and
`get_max_concurrency_for_kv_cache_config`; since 0.33 `get_global_kv_cache_groups` and backends'
`get_preferred_block_size`; `get_kv_cache_spec` of the attention layers, which asks
its layer for a few attributes only; `get_attn_backend`; `CacheConfig.kv_cache_layout`;
`Platform._align_hybrid_block_size`; `get_mamba_state_shape_from_config` of models with a state.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.host.devices import device_of
from vllm_hotswap.host.vllm_names import find
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")

FULL, SLIDING, CHUNKED, STATE, BOTH, NONE = "full", "sliding", "chunked", "state", "both", "none"

LOCAL = (SLIDING, CHUNKED)
"""Kinds that keep the last tokens only; some models attend to all of them all the same."""

KINDS = {
    "attention": FULL,
    "full_attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    "linear_attention": STATE,
    "mamba": STATE,
    "mamba2": STATE,
    "conv": STATE,
    "recurrent": STATE,
    "mlp": NONE,
    "moe": NONE,
}
"""Names of layers in the configurations of transformers. A name beyond them may be anything."""

UNEVEN = ("global_head_dim", "num_global_key_value_heads", "swa_num_key_value_heads", "index_topk")
"""Settings of models whose layers differ in more than their kind."""

BLOCK_TOKENS = 128
"""Tokens in a block on CPUs, unless the user or the backend wants another number."""

PLENTY_BYTES = 1 << 62
"""So many that dividing them by the number of blocks gives the size of a block."""


@dataclass(frozen=True, slots=True)
class KVLimits:
    """Bytes of KV memory on one device."""

    least: int
    """Enough for one sequence of the maximum length. vLLM refuses to load with less."""
    most: int
    """Enough for all sequences that may run at once, each of the maximum length."""
    block: int = 0
    """What one block takes in all layers; 0 where that is not known."""


NO_KV = KVLimits(0, 0)


def limits(config: Any, specs: Sequence[Mapping[str, Any]]) -> list[KVLimits]:
    """What each worker of a model can use, from the specs of its layers by name.

    Sequences times what vLLM counts for each, and the one block that it keeps for itself.
    """
    if not any(specs):
        return [NO_KV for _ in specs]
    config = _planning_copy(config)
    planned = _plan(config, [dict(worker) for worker in specs])
    return [_limits_of(config, worker) for worker in planned]


def _plan(config: Any, specs: list[dict[str, Any]]) -> list[Any]:
    """The KV caches of all workers, each of which has plenty of memory."""
    plan, memory = find("get_kv_cache_configs"), [PLENTY_BYTES] * len(specs)
    try:
        group = find("get_global_kv_cache_groups")
    except ConfigError:  # before vLLM 0.33, which has the groups made apart
        return list(plan(config, specs, memory))
    return list(plan(config, specs, memory, group(config, specs)))


def _limits_of(config: Any, planned: Any) -> KVLimits:
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    if not planned.kv_cache_tensors:
        return NO_KV
    concurrency = get_max_concurrency_for_kv_cache_config(config, planned)
    blocks = round(planned.num_blocks / concurrency)
    block_bytes = PLENTY_BYTES // planned.num_blocks
    sequences = config.scheduler_config.max_num_seqs
    most = block_bytes * (blocks * sequences + 1)
    return KVLimits(block_bytes * (blocks + 1), most, block_bytes)


def given_bytes(config: Any, limit: KVLimits) -> int | None:
    """The KV memory on one device that a configuration asks for; None where it asks for none.

    `num_gpu_blocks_override` counts more than bytes, as it does for vLLM.
    """
    blocks = config.cache_config.num_gpu_blocks_override
    if not limit.most:
        return 0
    if blocks is not None and limit.block:
        return int(blocks * limit.block)
    given: int | None = config.cache_config.kv_cache_memory_bytes
    return given


def kv_key(config: Any, limit: KVLimits) -> str:
    """The key from which `given_bytes` takes its number; empty where there is none."""
    if not limit.most:
        return ""
    if config.cache_config.num_gpu_blocks_override is not None and limit.block:
        return "num_gpu_blocks_override"
    return "" if config.cache_config.kv_cache_memory_bytes is None else "kv_cache_memory_bytes"


def _planning_copy(config: Any) -> Any:
    """The configuration with a layout of the KV cache, which an engine settles when it loads.

    Any will do: what a block takes is the same in all.
    """
    config = copy.copy(config)
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.num_gpu_blocks_override = None
    if getattr(config.cache_config, "kv_cache_layout", None) is None:
        config.cache_config.kv_cache_layout = "BLHNC"
    return config


# --- before a model is loaded -----------------------------------------------------------------


def expected_limits(config: Any) -> KVLimits:
    """What one worker of a model can use that is not loaded.

    For the kinds of layers that are known it is what the engine will say. Where the configuration
    leaves something open, it is an upper bound without a lower one: the load corrects it.
    """
    if not needs_kv(config):
        return NO_KV
    try:
        # More than a sequence of full attention needs is never too little for one of less.
        full = _limits_for(config, _in_full)
        found = _limits_for(config, _kinds)
    except Exception as error:  # noqa: BLE001  # a model that vLLM describes in a way of its own
        cause = one_line(error)
        model = value_text(config.model_config.model)
        log.info("event=kv_need_estimated model=%s cause=%r", model, cause)
        return KVLimits(0, _most_by_sizes(config))
    if _is_known(config, _kinds(config)):
        return KVLimits(found.least, max(found.most, full.least), found.block)
    return KVLimits(0, max(found.most, full.most), max(found.block, full.block))


def _models(config: Any) -> list[Any]:
    """A model's configuration, and that of its draft model, as vLLM makes it for its layers.

    Both have one KV cache, so they share the settings of it.
    """
    speculative = config.speculative_config
    draft = None if speculative is None else speculative.draft_model_config
    if draft is None or draft is config.model_config:
        return [config]
    drafting = copy.copy(config)
    drafting.model_config = draft
    drafting.parallel_config = speculative.draft_parallel_config or config.parallel_config
    drafting.speculative_config = None
    return [config, drafting]


def _most_by_sizes(config: Any) -> int:
    bounds = [_most_of_full_attention(model, _kinds(model)) for model in _models(config)]
    return min(sum(bounds), sys.maxsize)


def _most_of_full_attention(config: Any, kinds: Sequence[str]) -> int:
    """An upper bound by the sizes of keys and values alone; none where layers hold other things."""
    model, parallel = config.model_config, config.parallel_config
    if model.use_mla or not {*kinds} <= {FULL, SLIDING, CHUNKED, NONE}:
        return sys.maxsize
    heads, size = model.get_num_kv_heads(parallel), model.get_head_size()
    per_token = 2 * len(kinds) * heads * size * model.dtype.itemsize
    # A block is begun at either end, and vLLM keeps one.
    tokens = model.max_model_len + 2 * max(config.cache_config.block_size or 0, BLOCK_TOKENS)
    return int(per_token * tokens * (config.scheduler_config.max_num_seqs + 1))


def needs_kv(config: Any) -> bool:
    """Whether it keeps anything of a sequence: encoders that embed or classify do not."""
    model = config.model_config
    if model.is_attention_free and not model.has_inner_state:
        return False
    return str(model.attn_type) not in ("encoder_only", "encoder")


def _limits_for(config: Any, kinds_of: Callable[[Any], Iterable[str]]) -> KVLimits:
    from vllm.config import set_current_vllm_config

    config, specs = _planning_copy(config), dict[str, Any]()
    for model in _models(config):
        with set_current_vllm_config(model):
            maker = _Specs(model)
            for kind in kinds_of(model):
                specs |= {f"{len(specs)}.{part}": spec for part, spec in maker.of_layer(kind)}
    with set_current_vllm_config(config):
        return limits(config, [specs])[0]


def _in_full(config: Any) -> list[str]:
    """As `_kinds`, as if every layer that attends kept all tokens."""
    return [FULL if kind in LOCAL else kind for kind in _kinds(config)]


def _kinds(config: Any) -> list[str]:
    """The kind of each layer on the first rank."""
    model, parallel = config.model_config, config.parallel_config
    kinds = [KINDS.get(name, FULL) for name in _names(config)]
    if model.is_hybrid and {FULL, STATE} - {*kinds}:
        kinds = [BOTH] * len(kinds)  # layers that attend and keep a state, for all that is told
    first, end = model.get_layers_start_end_indices(parallel)
    # Layers that share the cache of others have none themselves; they come last.
    shared = getattr(model.hf_text_config, "num_kv_shared_layers", None) or 0
    return kinds[first : min(end, len(kinds) - shared)]


def _names(config: Any) -> list[str]:
    """What the configuration calls each layer, or what all of them must be."""
    model = config.model_config
    total = int(model.get_total_num_hidden_layers())
    text = model.hf_text_config
    for key in ("layers_block_type", "layer_types"):
        names = getattr(text, key, None)
        if names is not None and len(names) >= total:
            return [str(name) for name in names[:total]]
    if model.is_attention_free:
        return ["mamba"] * total
    if getattr(text, "attention_chunk_size", None):
        return ["chunked_attention"] * total
    is_sliding = config.cache_config.sliding_window is not None
    return ["sliding_attention" if is_sliding else "attention"] * total


def _is_known(config: Any, kinds: Sequence[str]) -> bool:
    """Whether every layer's cache follows from its kind, and the length is settled."""
    model, text = config.model_config, config.model_config.hf_text_config
    is_odd = (
        model.is_encoder_decoder
        or model.has_noops
        or config.speculative_config is not None
        # vLLM shortens sequences until they fit.
        or getattr(model, "original_max_model_len", None) == -1
        or any(getattr(text, name, None) for name in UNEVEN)
        or any(name not in KINDS for name in _names(config))
    )
    return not is_odd and BOTH not in kinds


class _Specs:
    """Makes the specs of layers as vLLM's own layers would."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._model = config.model_config
        self._text = config.model_config.hf_text_config
        self._settle_block_size()
        if self._model.is_hybrid:
            self._align()

    def of_layer(self, kind: str) -> Iterator[tuple[str, Any]]:
        if kind in (STATE, BOTH):
            yield "state", self._state()
        if kind not in (STATE, NONE):
            yield "attention", self._attention(kind)
        if kind != NONE and self._model.is_encoder_decoder:
            yield "cross", self._cross()

    def _attention(self, kind: str) -> Any:
        from vllm.model_executor.layers.attention.attention import Attention
        from vllm.model_executor.layers.attention.mla_attention import MLAAttention

        is_mla = self._model.use_mla
        window = getattr(self._text, "sliding_window", None) if kind == SLIDING else None
        layer = SimpleNamespace(
            attn_type="decoder",
            attn_backend=self._backend(is_mla, window),
            kv_cache_dtype=self._config.cache_config.cache_dtype,
            kv_cache_torch_dtype=self._kv_dtype(),
            num_kv_heads=self._model.get_num_kv_heads(self._config.parallel_config),
            head_size=self._model.get_head_size(),
            head_size_v=self._model.get_head_size(),
            sliding_window=window,
            attention_chunk_size=getattr(self._text, "attention_chunk_size", None),
            indexer=None,
            non_causal_multi_token_decode=False,
        )
        if kind == CHUNKED and layer.attention_chunk_size:
            return self._chunked(layer)
        return (MLAAttention if is_mla else Attention).get_kv_cache_spec(layer, self._config)

    def _chunked(self, layer: Any) -> Any:
        from vllm.model_executor.layers.attention.chunked_local_attention import (
            ChunkedLocalAttention,
        )

        return ChunkedLocalAttention.get_kv_cache_spec(layer, self._config)

    def _cross(self) -> Any:
        from vllm.v1.kv_cache_interface import CrossAttentionSpec

        return CrossAttentionSpec(
            block_size=self._config.cache_config.block_size,
            num_kv_heads=self._model.get_num_kv_heads(self._config.parallel_config),
            head_size=self._model.get_head_size(),
            dtype=self._kv_dtype(),
        )

    def _state(self) -> Any:
        from vllm.v1.kv_cache_interface import MambaSpec

        model, cache = self._model_class(), self._config.cache_config
        return MambaSpec(
            shapes=tuple(model.get_mamba_state_shape_from_config(self._config)),
            dtypes=tuple(model.get_mamba_state_dtype_from_config(self._config)),
            block_size=cache.mamba_block_size or self._model.max_model_len,
            page_size_padded=cache.mamba_page_size_padded,
            mamba_cache_mode=cache.mamba_cache_mode,
            **_checkpoint_blocks(MambaSpec),
        )

    def _settle_block_size(self) -> None:
        """Since vLLM 0.33, CPUs have it only once the executor is made; before, from the start."""
        from vllm.platforms import current_platform

        cache = self._config.cache_config
        is_settled = cache.user_specified_block_size or (cache.block_size or 0) >= BLOCK_TOKENS
        if current_platform.is_cpu() and not self._model.use_mla and not is_settled:
            backend = self._backend(False, None)
            cache.block_size = backend.get_preferred_block_size(BLOCK_TOKENS)

    def _align(self) -> None:
        """Make pages of states and of attention equally large, as a load does."""
        from vllm.platforms import current_platform

        backend = self._backend(self._model.use_mla, None)
        current_platform._align_hybrid_block_size(self._config, backend)

    def _model_class(self) -> Any:
        model = self._model
        return model.registry.resolve_model_cls(model.architecture, model_config=model)[0]

    def _backend(self, is_mla: bool, window: int | None) -> Any:
        from vllm.v1.attention.selector import get_attn_backend

        return get_attn_backend(
            self._model.get_head_size(),
            self._model.dtype,
            self._config.cache_config.cache_dtype,
            use_mla=is_mla,
            has_sliding_window=window is not None,
        )

    def _kv_dtype(self) -> Any:
        from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

        dtype = self._config.cache_config.cache_dtype
        return kv_cache_dtype_str_to_dtype(dtype, self._model)


def _checkpoint_blocks(spec: Any) -> dict[str, int]:
    """Mamba-2 asks for one; where a state does not, the load gives a little less.

    vLLM 0.26 knows no such blocks.
    """
    name = "num_prefill_checkpoint_blocks"
    return {name: 1} if name in spec.__dataclass_fields__ else {}


def kv_shares(config: Any) -> int:
    """Into how many parts a model's KV memory on its device is divided, one for each worker."""
    return ranks(config) if device_of(config).is_host_memory else 1


def ranks(config: Any) -> int:
    parallel = config.parallel_config
    return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
