"""The layers of the package: imports go downward, and few modules import vLLM."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "vllm_hotswap"

LAYERS = [
    {
        "addresses",
        "errors",
        "event_loop",
        "engine_share",
        "fair_pool",
        "file_limit",
        "forgotten",
        "garbage",
        "claims",
        "helper_process",
        "hints",
        "log_lines",
        "plain_grammars",
        "quiet",
        "deadlines",
        "start_folder",
        "signals",
        "terminal",
        "steps",
        "turns",
    },
    {
        "code_settings",
        "host.gaudi",
        "helpers",
        "json_scan",
        "media",
        "plain_words",
        "surrogates",
        "trusted_files",
    },
    {
        "states",
        "answers",
        "caches",
        "canary",
        "disclosure",
        "platforms",
        "devices",
        "failpoints",
        "nvml",
        "host.cuda_driver",
        "host.cuda_memory",
        "checkpoint",
        "cross_site",
        "first_head",
        "forwarded",
        "places",
        "refusals",
        "models_file",
        "unix_socket",
        "adapters",
        "keys",
        "model_field",
        "model_routes",
        "references",
        "prediction",
        "sampling",
        "security",
        "paths",
        "variables",
        "written",
        "host.vllm_names",
        "host.strays",
        "engines.sendable",
        "host.vllm_versions",
    },
    {
        "port_file",
        "planner",
        "environment",
        "host.hashing",
        "host.vllm_state",
        "host.uncompiled",
        "policy",
        "costs",
        "host.messages",
        "host.arena",
        "host.cuda_pools",
        "host.heap",
        "host.sealing",
        "host.teardown",
        "host.together",
    },
    {"host.randomness", "host.gloo"},
    {
        "host.cuda_hosting",
        "host.gaudi_worker",
        "host.weights",
        "host.canaries",
        "host.compiled",
        "host.lora",
        "host.state",
    },
    {"events", "budget", "models.engine", "testing.fake_responses"},
    {"settings"},
    {
        "asked",
        "limits",
        "policies",
        "scheduler",
        "rights",
        "config",
        "hub",
        "registry",
        "access",
        "job_leases",
        "openai",
        "host.loop",
        "host.progress",
        "host.threads",
    },
    {"trace", "rates", "pace"},
    {"simulate.service", "simulate.costs", "simulate.generate"},
    {"simulate.run", "simulate.fit"},
    {"simulate.report"},
    {"simulate.command", "record"},
    {
        "arrivals",
        "connections",
        "drain",
        "ladder",
        "switch",
        "dispatch",
        "metrics",
        "jobs",
        "recovery",
        "progress",
        "listen",
        "feed",
        "prewake",
        "routes",
    },
    {
        "audit",
        "dispatch",
        "foresight",
        "description",
        "host.grammars",
        "host.grammar_rehearsals",
        "host.process",
        "testing.fake_frontend",
        "testing.fake_process_host",
    },
    {
        "coordinator",
        "host.base_cpu_worker",
        "host.kv_cache",
        "launch.packing",
        "launch.needs",
        "host.loading",
        "host.engine",
        "host.executor",
        "host.cpu_worker",
        "host.cuda_worker",
    },
    {
        "launch.vllm_adapters",
        "engines.vllm_canary",
        "launch.vllm_config",
        "engines.frontend",
        "launch.inspection",
        "engines.kept_responses",
        "engines.spread",
        "engines.stamps",
        "launch.tasks",
        "launch.rehearsal",
        "exchange",
        "responses",
    },
    {"lora_modules", "engines.preview", "engines.adapters"},
    {
        "routing",
        "operations",
        "host.obey",
        "flags",
        "launch",
        "engines.link",
        "testing.fake_engine",
    },
    {"engines.base_memory"},
    {
        "admin",
        "adapter_routes",
        "job_routes",
        "check",
        "misspelt",
        "schema",
        "engines.vllm_engine",
        "testing.fake_process",
        "host.__main__",
        "testing.fake_process_main",
    },
    {"own_routes"},
    {"app"},
    {"server"},
    {"testing.fake_models"},
    {"demo", "remote", "testing.fake_server"},
    {"cli"},
    {"entrypoints.openai.multi_model_api_server", "__main__"},
]
"""Modules by height: each may import modules below it, and its own layer."""

VLLM_DOORS = {
    "launch.vllm_adapters",
    "engines.vllm_canary",
    "launch.vllm_config",
    "host.base_cpu_worker",
    "engines.frontend",
    "host.kv_cache",
    "launch.inspection",
    "host.loading",
    "launch.packing",
    "host.grammar_rehearsals",
    "engines.sendable",
    "launch.rehearsal",
    "host.vllm_versions",
    "devices",
    "metrics",
    "host.compiled",
    "host.cpu_worker",
    "host.cuda_worker",
    "host.engine",
    "host.executor",
    "host.lora",
    "host.state",
    "host.weights",
    "host.uncompiled",
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, path


def imports(path: Path) -> Iterator[str]:
    """Absolute names that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def height(module: str) -> int:
    """Return the layer of a module, or of the package that contains it."""
    for number, layer in enumerate(LAYERS):
        if module in layer:
            return number
    raise AssertionError(f"{module} is in no layer; add it to LAYERS")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value)[-30:])
def test_imports_go_downward(module: str, path: Path) -> None:
    """No module imports a module of a higher layer."""
    known = {name for name, _ in modules()}
    imported = {name.removeprefix("vllm_hotswap.") for name in imports(path)} & known

    assert [] == sorted(name for name in imported if height(name) > height(module))


def test_few_modules_import_vllm() -> None:
    """Only a few modules, which are listed here, import vLLM."""
    doors = {
        module
        for module, path in modules()
        if any(name == "vllm" or name.startswith("vllm.") for name in imports(path))
    }

    assert VLLM_DOORS == doors
