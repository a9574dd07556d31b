"""What the YAML file alone cannot permit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_hotswap.config.code_settings import code_keys
from vllm_hotswap.config.permissions import PERMISSIONS, check_settings, parse_allowed
from vllm_hotswap.config.reader import load_config, read_config
from vllm_hotswap.config.written import Place
from vllm_hotswap.errors import ConfigError

NOTHING: frozenset[str] = frozenset()


def here(*keys: str) -> Place:
    return Place(".".join(("here", *keys)))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"worker_cls": "mine.Worker"}, "worker_cls"),
        ({"worker-extension-cls": "mine.Worker"}, "worker_extension_cls"),
        ({"scheduler_cls": "mine.Scheduler"}, "scheduler_cls"),
        ({"tool_parser_plugin": "./mine.py"}, "tool_parser_plugin"),
        ({"reasoning_parser_plugin": "./mine.py"}, "reasoning_parser_plugin"),
        ({"io_processor_plugin": "mine"}, "io_processor_plugin"),
        ({"logits_processors": ["mine.Processor"]}, "logits_processors"),
        ({"middleware": ["mine.Middleware"]}, "middleware"),
        ({"model_class_overrides": {"A": "mine:B"}}, "model_class_overrides"),
        ({"distributed_executor_backend": "mine.Executor"}, "distributed_executor_backend"),
        ({"compilation_config": {"backend": "mine.compile"}}, "compilation_config.backend"),
        (
            {"kv_transfer_config": {"kv_connector_module_path": "mine"}},
            "kv_transfer_config.kv_connector_module_path",
        ),
        (
            {"structured_outputs_config": {"reasoning_parser_plugin": "mine.py"}},
            "structured_outputs_config.reasoning_parser_plugin",
        ),
        ({"tool_server": "demo"}, "tool_server"),
        ({"compilation_config": '{"backend": "mine.compile"}'}, "compilation_config.backend"),
        (
            {"kv_transfer_config": {"extra": {"tiers": [{"module_path": "mine"}]}}},
            "kv_transfer_config.extra.tiers.module_path",
        ),
        (
            {"kv_transfer_config": {"extra": {"policy": "mine.Policy"}}},
            "kv_transfer_config.extra.policy",
        ),
        ({"speculative_config": {"method": "custom_class"}}, "speculative_config.method"),
        ({"spec_method": "custom_class"}, "spec_method"),
        # whatever the value looks like
        ({"distributed_executor_backend": "evil.json"}, "distributed_executor_backend"),
        ({"distributed_executor_backend": "évil.Cls"}, "distributed_executor_backend"),
        ({"distributed_executor_backend": "my-mod.Cls"}, "distributed_executor_backend"),
        ({"distributed_executor_backend": "evil"}, "distributed_executor_backend"),
        ({"compilation_config": {"backend": "evil.json", "mode": 2}}, "compilation_config.backend"),
        ({"compilation_config": {"backend": "evil"}}, "compilation_config.backend"),
        ({"attention_config": {"backend": "évil.json"}}, "attention_config.backend"),
        ({"weight_transfer_config": {"backend": "evil.json"}}, "weight_transfer_config.backend"),
        ({"mm_encoder_attn_backend": "my-mod.Cls"}, "mm_encoder_attn_backend"),
        ({"io_processor_plugin": "auto"}, "io_processor_plugin"),
        ({"tool_parser_plugin": "auto"}, "tool_parser_plugin"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector_extra_config": {
                        "secondary_tiers": [
                            {"type": "fs", "backpressure": {"detector": "evil.json"}}
                        ]
                    }
                }
            },
            "kv_transfer_config.kv_connector_extra_config.secondary_tiers.backpressure.detector",
        ),
        (
            {"kv_transfer_config": {"kv_connector_extra_config": {"names": ["x", "évil.json"]}}},
            "kv_transfer_config.kv_connector_extra_config.names",
        ),
        (
            {"kv_transfer_config": {"kv_connector_extra_config": {"lm.module_path": "evil"}}},
            "kv_transfer_config.kv_connector_extra_config.lm.module_path",
        ),
        (
            {"kv_transfer_config": {"kv_connector_extra_config": '{"policy": "evil.json"}'}},
            "kv_transfer_config.kv_connector_extra_config.policy",
        ),
        ({"compilation_config": {"cache_dir": "/srv/cache"}}, "compilation_config.cache_dir"),
        (
            {"compilation_config": {"inductor_compile_config": {"cpp.cxx": "/srv/cxx"}}},
            "compilation_config.inductor_compile_config.cpp.cxx",
        ),
        (
            {"compilation_config": {"inductor_compile_config": {"cpp.cxx": ["/srv/cxx"]}}},
            "compilation_config.inductor_compile_config.cpp.cxx",
        ),
        (
            {"load_format": "ipc", "model_loader_extra_config": {"socket_path": "/srv/s"}},
            "model_loader_extra_config.socket_path",
        ),
        ({"speculative_config": {"model": "evil.Cls"}}, "speculative_config.model"),
        ({"spec_model": "evil.Cls"}, "spec_model"),
        (
            {"speculative_config": {"draft_parallel_config": {"ray_runtime_env": {"pip": "x"}}}},
            "speculative_config.draft_parallel_config.ray_runtime_env",
        ),
        (
            {"logging_config": {"pylogging_config_file": "x"}},
            "logging_config.pylogging_config_file",
        ),
        (
            {"hf_overrides": {"_attn_implementation": "org/kernel"}},
            "hf_overrides._attn_implementation",
        ),
        ({"hf_overrides": {"x": {"y": "evil.json"}}}, "hf_overrides.x.y"),
        ({"flag_of_a_later_vllm": "evil.json"}, "flag_of_a_later_vllm"),
        ({"flag_of_a_later_vllm": {"a": ["evil:Cls"]}}, "flag_of_a_later_vllm.a"),
    ],
)
def test_settings_that_name_code_are_refused(settings: dict[str, Any], key: str) -> None:
    """Settings that name code are refused unless allowed; the message says how to allow them."""
    with pytest.raises(ConfigError, match=f"here.{key} names code .* --allow code"):
        check_settings(settings, here, NOTHING)

    check_settings(settings, here, frozenset(["code"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"distributed_executor_backend": "mp"},
        {"attention_backend": "FLASH_ATTN"},
        {"worker_cls": "auto", "scheduler_cls": None, "middleware": []},
        {"tool_server": "127.0.0.1:8000"},
        {"max_lora_cls_labels": 3, "tool_call_parser": "hermes", "mm_processor_kwargs": {"a": 1}},
        {"compilation_config": {"mode": 3, "backend": "inductor", "splitting_ops": ["vllm.attn"]}},
        {"speculative_config": {"method": "ngram", "model": "org/model-0.5", "n": 0.5}},
        {"hf_overrides": '{"rope_theta": 1e6', "lora_target_modules": ["model.layers.0"]},
        {"generation_config": "./generation.json", "download_dir": "a.b"},
        {"speculative_config": {"model": "org/draft-1.5B.v2"}, "spec_model": "./draft.v2"},
        {
            "hf_overrides": {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                "dtype": "float16",
            }
        },
        {"hf_overrides": {"quantization_config": {"modules_to_not_convert": ["model.layers.0"]}}},
        {"hf_overrides": {"_name_or_path": "org/model-0.5", "transformers_version": "5.1.0"}},
        {
            "max_model_len": "25.6k",
            "revision": "v1.0",
            "chat_template": "./a.jinja",
            "dtype": "auto",
        },
        {"lora_modules": ["sql=./adapters/sql.v1", '{"name": "a.b", "path": "./a.b"}']},
        {"default_chat_template_kwargs": {"date": "1. May"}, "tool_call_parser": "a.b"},
        {"kv_transfer_config": {"kv_connector": "X", "kv_connector_extra_config": {"n": 1.5}}},
        {
            "kv_transfer_config": {
                "kv_connector_extra_config": {
                    "file": "/srv/a.yaml",
                    "proxy_ip": "10.0.0.1",
                    "bind": "10.0.0.1:80",
                    "url": "cache.example.com:80",
                    "remote": "redis://cache.example.com",
                    "size": "1.5GB",
                    "device": "cuda:0",
                }
            }
        },
        {"kv_events_config": {"endpoint": "tcp://a.b:1", "topic": "a.b", "publisher": "zmq"}},
        {"compilation_config": {"inductor_compile_config": {"max_autotune": True}}},
        {"compilation_config": {"mode": 3, "custom_ops": ["+rms_norm"], "cudagraph_mode": "FULL"}},
    ],
)
def test_ordinary_settings_pass(settings: dict[str, Any]) -> None:
    """Names that only look alike, and values that name no code, pass."""
    assert [] == list(code_keys(settings))


def test_code_of_a_checkpoint_is_refused() -> None:
    """`trust_remote_code` is refused without a permission of its own."""
    settings = {"trust_remote_code": True}
    with pytest.raises(ConfigError, match="--allow trust_remote_code"):
        check_settings(settings, here, frozenset(["code"]))

    check_settings(settings, here, frozenset(["trust_remote_code"]))
    check_settings({"trust_remote_code": False}, "here", NOTHING)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mm_processor_kwargs": {"trust_remote_code": True}}, "mm_processor_kwargs"),
        ({"hf-overrides": '{"text-config": {"trust-remote-code": 1}}'}, "hf_overrides.text_config"),
        ({"speculative_config": {"draft_model_config": {"trust_remote_code": True}}}, "draft"),
    ],
)
def test_code_of_a_checkpoint_is_refused_wherever_it_is_trusted(
    settings: dict[str, Any], key: str
) -> None:
    """Code of a checkpoint is refused inside of other settings, too."""
    with pytest.raises(ConfigError, match=f"{key}.*trust_remote_code runs code"):
        check_settings(settings, here, NOTHING)


@pytest.mark.parametrize(
    "settings",
    [
        "distributed_executor_backend: evil.json",
        "distributed_executor_backend: évil.Cls",
        "distributed-executor-backend: my-mod.Cls",
        "compilation_config: {backend: evil.json, mode: 2}",
        "compilation_config: {inductor_passes: {x: evil.f}}",
        'compilation-config: \'{"cache_dir": "/srv/cache"}\'',
        "mm_processor_kwargs: {trust_remote_code: true}",
    ],
)
def test_what_is_refused_is_given_to_nobody(tmp_path: Path, settings: str) -> None:
    """Refused values never reach vLLM's parser, which would import what some of them name."""
    path = tmp_path / "models.yaml"
    path.write_text(f"models: {{a: {{model: org/a, revision: x, {settings}}}}}")

    read = read_config(path)

    (mistake,) = read.mistakes
    assert "runs code" in mistake.message or "names code" in mistake.message
    assert read.config is not None
    assert {"revision": "x"} == read.config.models[0].settings
    allowed = read_config(path, allowed=frozenset(["code", "trust_remote_code"])).whole()
    assert 2 == len(allowed.models[0].settings)


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    """A file that every user may write is refused; the message says what to do."""
    path = tmp_path / "models.yaml"
    path.write_text("models: {a: {model: org/a}}")
    path.chmod(0o666)

    with pytest.raises(ConfigError, match=r"chmod o-w .*, or start with --allow world_writable"):
        load_config(path)
    assert ("a",) == load_config(path, allowed=frozenset(["world_writable"])).aliases


def test_permissions_are_words_separated_by_commas() -> None:
    """Permissions are separated by commas, in a flag given once or more, or in the variable."""
    assert frozenset(["code", "world_writable"]) == parse_allowed(["", "code, world_writable"])
    assert frozenset(PERMISSIONS) == parse_allowed(PERMISSIONS)
    with pytest.raises(ConfigError, match="'everything' is not known; known: trust_remote_code"):
        parse_allowed(["everything"])


def test_defaults_are_checked_like_models(tmp_path: Path) -> None:
    """Defaults, which count for every model, are checked like models."""
    path = tmp_path / "models.yaml"
    path.write_text("defaults: {trust_remote_code: true}\nmodels: {a: {model: org/a}}")

    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_config(path)
