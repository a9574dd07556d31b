"""From a model's entry in the file to what vLLM needs to run it."""

from __future__ import annotations

from vllm_hotswap.launch import hub, prepare, rehearsal
from vllm_hotswap.launch.adapter_files import read_adapter, shapes_of
from vllm_hotswap.launch.adapters import check_names
from vllm_hotswap.launch.budget import ModelNeeds
from vllm_hotswap.launch.checkpoint import check_weights, read_ahead, weight_files
from vllm_hotswap.launch.flags import (
    load_with_flags,
    model_flags,
    model_namespace,
    parse_server_flags,
    setting_mistakes,
)
from vllm_hotswap.launch.inspection import inspected_here
from vllm_hotswap.launch.misspelt import explained, known_flags, refuse_misspelt, refuse_unknown
from vllm_hotswap.launch.prepare import ModelLaunch, plan_memory, prepare_model
from vllm_hotswap.launch.rehearsal import generates
from vllm_hotswap.launch.schema import EDITOR_LINE, json_schema
from vllm_hotswap.launch.tasks import foresee
from vllm_hotswap.launch.vllm_adapters import (
    adapter_request,
    check_adapter,
    ids_of_vllm,
    load_adapter,
    serve_adapter,
    stop_serving,
)
from vllm_hotswap.launch.vllm_config import describing_parser, serve_parser

__all__ = [
    "EDITOR_LINE",
    "ModelLaunch",
    "ModelNeeds",
    "adapter_request",
    "check_adapter",
    "check_names",
    "check_weights",
    "describing_parser",
    "explained",
    "foresee",
    "generates",
    "hub",
    "ids_of_vllm",
    "inspected_here",
    "json_schema",
    "known_flags",
    "load_adapter",
    "load_with_flags",
    "model_flags",
    "model_namespace",
    "parse_server_flags",
    "plan_memory",
    "prepare",
    "prepare_model",
    "read_adapter",
    "read_ahead",
    "refuse_misspelt",
    "refuse_unknown",
    "rehearsal",
    "serve_adapter",
    "serve_parser",
    "setting_mistakes",
    "shapes_of",
    "stop_serving",
    "weight_files",
]
