"""Settings of vLLM that name code: each setting is classified here, by its name.

Only settings of an open type, such as a text, can name code and must be classified. A test checks
every field of the installed vLLM's arguments, and every place in its sources that imports,
unpickles or runs what it is given. A field that is in no table here fails the test; at run time,
its value is treated like those of `FREE`.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping

CUSTOM_CLASS = "custom_class"
"""Method of speculative decoding whose model is the name of a class."""

NOTHING: tuple[object, ...] = (None, "", [], {})

CODE: Mapping[str, str] = {
    "cache_dir": "compiled code and pickles are loaded from there",
    "local_cache_dir": "the same",
    "encoder_cache_manager_cls": "a class",
    "inductor_passes": "functions",
    "io_processor_plugin": "an entry point that is run",
    "log_config_file": "`logging.config` calls what it names",
    "pylogging_config_file": "the same",
    "logits_processors": "classes",
    "logits_processor_pattern": "classes that requests may name",
    "middleware": "classes or functions",
    "model_class_overrides": "classes",
    "placement_group": "an object of Ray's",
    "ray_runtime_env": "packages, folders and variables that worker processes get",
    "reasoning_parser_plugin": "a module or a file",
    "scheduler_cls": "a class",
    "sd_worker_cls": "a class",
    "socket_path": "the loader `ipc` unpickles what comes from there",
    "tool_parser_plugin": "a module or a file",
    "worker_cls": "a class",
    "worker_extension_cls": "a class",
    "kv_connector_module_path": "a module",
    "ec_connector_module_path": "a module",
}
"""Settings that name code whatever their value, with what they name."""

LIKE_CODE = re.compile(
    r"(^|[._])(cls|class|classes|class_name|plugin|plugins|module|module_path|module_name|qualname|"
    r"logits_processors|middleware|class_overrides|inductor_passes|custom_passes|custom_generate)$"
)
"""Names that also mean code, for settings that are in no table, and for keys inside mappings."""

DEFAULTS: Mapping[str, object] = {"worker_cls": "auto"}
"""Values of `CODE` that name nothing."""

CHOICES: Mapping[str, frozenset[str]] = {
    "distributed_executor_backend": frozenset(["ray", "mp", "uni", "external_launcher"]),
    "compilation_config.backend": frozenset(
        ["eager", "inductor", "aot_eager", "cudagraphs", "openxla", "hpu_backend"]
    ),
}
"""Settings that are a word of vLLM or torch, or else the name of a class, with these words."""

WORD = re.compile(r"[A-Za-z0-9_-]+")
"""Pattern that any other `*_backend` must match; the name of something to import has a dot."""

NUMBERS_ONLY = frozenset(["inductor_compile_config"])
"""Mappings to options of a compiler; text options include programs that it calls."""

FREE = frozenset(
    [
        "additional_config",
        "ec_connector_extra_config",
        "hf_overrides",
        "kv_connector_extra_config",
        "limit_per_prompt",
        "manager_config",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "model_loader_extra_config",
    ]
)
"""Mappings whose keys vLLM does not declare: a text in them names code if it could be imported."""

ADDRESS = re.compile(r"(^|[._])(ip|host|addr|address|url|uri|endpoint)$")
"""Keys in such mappings whose text is an address, which may have dots."""

LAYERS = frozenset(
    [
        "exclude_modules",
        "ignore",
        "ignored_layers",
        "lora_target_modules",
        "modules_to_not_convert",
        "quantization_config",
        "splitting_ops",
        "targets",
    ]
)
"""Settings that hold names of layers and operators, which have dots; in `hf_overrides`, too."""

PLAIN = frozenset(
    [
        # names of models, revisions, data files, and other names that are looked up in tables
        *("model", "model_weights", "served_model_name", "tokenizer", "tokenizer_mode"),
        *("hf_config_path", "config_format", "load_format", "model_impl", "hf_token"),
        *("revision", "code_revision", "tokenizer_revision", "download_dir", "ignore_patterns"),
        *("quantization", "dtype", "kv_cache_dtype", "lora_dtype", "mm_encoder_attn_dtype"),
        *(
            "indexer_kv_dtype",
            "override_attention_dtype",
            "dump_dir",
            "sleep_preserve_parameter_names",
        ),
        *("allowed_local_media_path", "allowed_media_domains", "generation_config"),
        *("override_generation_config", "pt_load_map_location", "device", "device_ids"),
        *("cpu_offload_params", "offload_params", "kv_cache_dtype_skip_layers", "numa_bind_cpus"),
        *("mm_encoder_fp8_scale_path", "mm_encoder_fp8_scale_save_path", "mm_processor_device"),
        *("video_pruning_method", "default_mm_loras", "custom_ops", "compile_sizes"),
        *("rms_norm", "fused_add_rms_norm", "gelu_and_mul_sparse"),
        # parts of models, found in vLLM's tables
        *("reasoning_parser", "tool_call_parser", "spec_method", "method"),
        # text
        *("chat_template", "default_chat_template_kwargs", "response_role", "cohere_format"),
        *("reasoning_start_str", "reasoning_end_str", "reasoning_effort_map", "fingerprint_value"),
        *("show_hidden_metrics_for_version", "topic", "engine_id", "name", "base_model_name"),
        # addresses, and folders that are written to
        *("master_addr", "data_parallel_address", "data_parallel_master_ip", "kv_ip", "ec_ip"),
        *("otlp_traces_endpoint", "endpoint", "replay_endpoint", "tool_server", "path"),
        *("debug_dump_path", "torch_profiler_dir", "proton_profiler_dir", "proton_mode"),
        # connectors that vLLM has; others need a module's path
        *("kv_connector", "ec_connector", "kv_buffer_device", "ec_buffer_device"),
        *("lora_modules",),
        # settings of the server, which a model's section must not have
        *("host", "uds", "root_path", "api_key", "allowed_origins", "allowed_methods"),
        *("allowed_headers", "disable_access_log_for_endpoints"),
        *("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_ciphers"),
    ]
)
"""Open settings that do not name code, whatever their value."""

DRAFTS = frozenset(["spec_model", "speculative_config.model"])
"""Settings that name a checkpoint, or a class if the text could be one, whatever the method."""

SECTION = re.compile(r"(.+_config|ir_op_priority)")
"""Mappings that become one of vLLM's configuration classes; its fields are classified by name."""

_QUANTITY = re.compile(r"[+-]?\d+(\.\d+)*[A-Za-z]{0,3}")
"""A number, a size or a version."""


def is_decided(name: str) -> bool:
    """Whether an open setting of vLLM is in a table."""
    tables = (CODE, CHOICES, DRAFTS, NUMBERS_ONLY, FREE, LAYERS, PLAIN)
    return any(name in table for table in tables) or _is_backend(name) or _is_section(name)


def code_keys(settings: Mapping[str, object]) -> Iterator[list[str]]:
    """Yield the key paths of a model's settings, nested ones too, that name code."""
    for key, value in settings.items():
        yield from _of_setting("", key.replace("-", "_"), _parsed(value), within="")


def trusting_keys(settings: Mapping[str, object]) -> Iterator[list[str]]:
    """Yield the key path of every `trust_remote_code` that is on, nested ones too."""
    for key, value in settings.items():
        yield from _trusting(key.replace("-", "_"), _parsed(value))


def _trusting(key: str, value: object) -> Iterator[list[str]]:
    if key == "trust_remote_code" and value:
        yield [key]
    for inner, item in _entries(value):
        for keys in _trusting(inner, item):
            yield [key, *keys]


def _entries(value: object) -> Iterator[tuple[str, object]]:
    """Yield keys and values of a mapping, or of the mappings in a list."""
    if isinstance(value, dict):
        yield from ((str(name).replace("-", "_"), _parsed(item)) for name, item in value.items())
    elif isinstance(value, list):
        for item in map(_parsed, value):
            yield from _entries(item)


def _texts(value: object) -> Iterator[str]:
    """Yield a text, or the texts in a list, but not those of mappings in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in map(_parsed, value):
            yield from _texts(item)


def _of_setting(parent: str, key: str, value: object, within: str) -> Iterator[list[str]]:
    """Yield the key paths, from a key on, to what names code in its value.

    `within` is the mapping of `FREE`, or the unknown mapping, that contains it; empty if none does.
    """
    if value in NOTHING or value == DEFAULTS.get(key, NOTHING):
        return
    is_number = isinstance(value, bool | int | float)
    if key in CODE or (LIKE_CODE.search(key) and not is_number):
        yield [key]
        return
    if any(_names_code(parent, key, text, within) for text in _texts(value)):
        yield [key]
    if _is_plain(key, within):
        return
    inside = within or ("" if _is_section(key) else key)
    for inner, item in _entries(value):
        if key in NUMBERS_ONLY and not isinstance(item, bool | int | float | None):
            yield [key, inner]
        else:
            yield from ([key, *keys] for keys in _of_setting(key, inner, item, inside))


def _names_code(parent: str, key: str, text: str, within: str) -> bool:
    if text == CUSTOM_CLASS or (key == "tool_server" and text == "demo"):
        return True
    way = f"{parent}.{key}".removeprefix(".")
    if (words := CHOICES.get(way)) is not None:
        return text not in words
    if way in DRAFTS:
        return could_be_imported(text)
    if _is_backend(key):
        return not WORD.fullmatch(text)
    if _is_plain(key, within) or (within and ADDRESS.search(key)):
        return False
    return could_be_imported(text)


def _is_plain(key: str, within: str) -> bool:
    if key in LAYERS:
        return within in ("", "hf_overrides")
    return key in PLAIN and not within


def _is_section(key: str) -> bool:
    return key not in FREE and SECTION.fullmatch(key) is not None


def _is_backend(key: str) -> bool:
    """Whether it selects an implementation; Transformers' attention may come from a hub."""
    return key.endswith(("_backend", "attn_implementation")) or key == "backend"


def could_be_imported(text: str) -> bool:
    """Whether a text may name something in a module.

    Python imports what stands before the first dot, whatever letters it has, unless it is a path.
    """
    module, dot, _ = text.partition(".")
    named, colon, rest = text.partition(":")
    if _QUANTITY.fullmatch(text) or _is_address(text) or _is_address(text.rpartition(":")[0]):
        return False
    is_dotted = bool(dot and module) and "/" not in module
    is_in_module = bool(colon and named) and "/" not in named and rest.isidentifier()
    return is_dotted or is_in_module


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def _parsed(value: object) -> object:
    """Parse a text that vLLM would read as JSON; return any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
