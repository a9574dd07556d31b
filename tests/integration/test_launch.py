"""From YAML keys to vLLM's own configuration: names, types, precedence, and mistakes."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import warnings
from importlib import import_module
from pathlib import Path

import pytest
from starlette.applications import Starlette

from tests.helpers.serving import flags
from vllm_hotswap.config.permissions import code_keys
from vllm_hotswap.config.reader import ModelConfig, load_config
from vllm_hotswap.connections.listen import Listener
from vllm_hotswap.demo.quickstart import MODELS, write
from vllm_hotswap.engines.frontend import certificate_refresher, uvicorn_log_config
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host.vllm_versions import vllm_version
from vllm_hotswap.launch.flags import model_flags
from vllm_hotswap.launch.prepare import Launch, parse_flags, prepare, weights_bytes
from vllm_hotswap.launch.vllm_config import engine_config, serve_parser


def launch(text: str, folder: Path, *flags: str) -> Launch:
    """Run everything that a start does before it makes an engine."""
    path = folder / "models.yaml"
    path.write_text(text.replace("LLAMA", str(MODELS / "llama")))
    config = load_config(path)
    return prepare(config, parse_flags(config, flags))


def test_every_key_of_the_quickstarts_example_reaches_vllm(tmp_path: Path) -> None:
    """Every key of the quickstart's example reaches vLLM for its own model, engine and frontend."""
    config = load_config(write(tmp_path))
    llama, qwen, embed = prepare(config, parse_flags(config, [])).models

    assert (2048, 1) == (
        llama.vllm_config.model_config.max_model_len,
        llama.vllm_config.parallel_config.tensor_parallel_size,
    )
    assert (False, None) == (llama.args.enable_auto_tool_choice, llama.args.tool_call_parser)
    assert (True, "hermes") == (qwen.args.enable_auto_tool_choice, qwen.args.tool_call_parser)
    assert "pooling" == embed.vllm_config.model_config.runner_type
    assert "llama" == llama.vllm_config.model_config.served_model_name
    assert llama.weights_bytes == (MODELS / "llama" / "model.safetensors").stat().st_size


def test_a_models_setting_wins_over_the_command_line_and_that_over_vllms_default(
    tmp_path: Path,
) -> None:
    """A model's setting, switches included, wins over the command line, then vLLM's default."""
    text = """
        models:
          own: {model: LLAMA, max_model_len: 512, enforce_eager: false, max_num_seqs: 4}
          common: {model: LLAMA}
    """
    made = launch(text, tmp_path, "--max-model-len", "1k", "--enforce-eager")
    own, common = (model.vllm_config for model in made.models)

    assert (512, 1000) == (own.model_config.max_model_len, common.model_config.max_model_len)
    assert (False, True) == (own.model_config.enforce_eager, common.model_config.enforce_eager)
    assert 4 == own.scheduler_config.max_num_seqs


def test_a_models_setting_undoes_what_the_command_line_gave(tmp_path: Path) -> None:
    """In a model, `false` turns any switch off, null is vLLM's default, a list replaces a list."""
    text = """
        models:
          own:
            model: LLAMA
            disable_log_stats: false
            max_model_len: null
            enable_prefix_caching: null
            generation_config: null
            middleware: [b.c]
          common: {model: LLAMA}
    """
    flags = ["--disable-log-stats", "--max-model-len", "512", "--no-enable-prefix-caching"]
    flags += ["--generation-config", "vllm", "--middleware", "a.b"]
    path = tmp_path / "models.yaml"
    path.write_text(text.replace("LLAMA", str(MODELS / "llama")))
    config = load_config(path, allowed=frozenset(["code"]))
    parsed = parse_flags(config, flags)
    own, common, default = parsed["own"], parsed["common"], parse_flags(config, [])[""]

    assert (False, True) == (own.disable_log_stats, common.disable_log_stats)
    assert (default.max_model_len, 512) == (own.max_model_len, common.max_model_len)
    assert (None, False) == (own.enable_prefix_caching, common.enable_prefix_caching)
    assert (default.generation_config, "vllm") == (own.generation_config, common.generation_config)
    assert (["b.c"], ["a.b"]) == (own.middleware, common.middleware)


def test_a_key_has_dashes_or_underscores(tmp_path: Path) -> None:
    """A key may have dashes or underscores, as its flag or as vLLM's configuration file."""
    text = "models: {llama: {model: LLAMA, gpu_memory_utilization: 0.5, max-model-len: 256}}"
    (model,) = launch(text, tmp_path).models

    assert 0.5 == model.vllm_config.cache_config.gpu_memory_utilization
    assert 256 == model.vllm_config.model_config.max_model_len


def test_a_key_may_be_any_long_name_of_its_flag(tmp_path: Path) -> None:
    """A key may be any long name of its flag."""
    if "device_memory_utilization" not in model_flags(serve_parser("test")):
        pytest.skip("no flag has two long names in vLLM 0.26 to 0.30")
    text = "models: {llama: {model: LLAMA, device_memory_utilization: 0.5}}"
    (model,) = launch(text, tmp_path).models

    assert 0.5 == model.vllm_config.cache_config.gpu_memory_utilization


def test_structured_values_pass_through(tmp_path: Path) -> None:
    """Mappings become JSON, lists become several values, and null leaves the default."""
    text = """
        models:
          llama:
            model: LLAMA
            override_generation_config: {temperature: 0.5}
            hf_overrides: {rope_theta: 20000.0}
            tool_call_parser: null
            middleware: []
    """
    (model,) = launch(text, tmp_path).models

    assert {"temperature": 0.5} == model.vllm_config.model_config.override_generation_config
    assert model.args.tool_call_parser is None


def test_a_reasoning_parser_is_one_models_alone(tmp_path: Path) -> None:
    """A reasoning parser is one model's, in frontend and engine, wherever it stands."""
    text = """
        models:
          first: {model: LLAMA}
          second: {model: LLAMA, reasoning_parser: deepseek_v3}
          third: {model: LLAMA, reasoning_parser: granite}
          last: {model: LLAMA}
    """
    models = launch(text, tmp_path).models

    expected = ["", "deepseek_v3", "granite", ""]
    assert expected == [m.args.structured_outputs_config.reasoning_parser for m in models]
    assert expected == [m.vllm_config.structured_outputs_config.reasoning_parser for m in models]


def test_a_chat_template_beside_the_file_is_found(tmp_path: Path) -> None:
    """A chat template's relative path counts from the YAML file; inline Jinja is left alone."""
    (tmp_path / "short.jinja").write_text("{{ messages }}")
    text = """
        models:
          file: {model: LLAMA, chat_template: short.jinja}
          inline: {model: LLAMA, chat_template: "{{ messages }}"}
    """
    file, inline = launch(text, tmp_path).models

    assert str(tmp_path / "short.jinja") == file.args.chat_template
    assert "{{ messages }}" == inline.args.chat_template


def test_other_paths_relative_to_the_file_are_written_with_a_dot(tmp_path: Path) -> None:
    """Paths with a dot count from the file, wherever the server starts; other names are kept."""
    text = """
        models:
          dotted: {model: LLAMA, download_dir: ./cache, generation_config: ../generation}
          plain: {model: LLAMA, download_dir: cache}
    """
    path = tmp_path / "models.yaml"
    path.write_text(text.replace("LLAMA", str(MODELS / "llama")))
    parsed = parse_flags(load_config(path), [])

    assert str(tmp_path / "cache") == parsed["dotted"].download_dir
    assert str(tmp_path.parent / "generation") == parsed["dotted"].generation_config
    assert "cache" == parsed["plain"].download_dir


def test_paths_inside_of_values_are_relative_to_the_file_too(tmp_path: Path) -> None:
    """Paths in mappings and lists count from the file, too; an empty list is vLLM's default."""
    text = """
        models:
          own:
            model: LLAMA
            hf_overrides: {path: ./a, paths: [../b, c]}
            allowed_media_domains: []
    """
    path = tmp_path / "models.yaml"
    path.write_text(text.replace("LLAMA", str(MODELS / "llama")))
    own = parse_flags(load_config(path), ["--allowed-media-domains", "x"])["own"]

    expected = {"path": str(tmp_path / "a"), "paths": [str(tmp_path.parent / "b"), "c"]}
    assert (expected, None) == (own.hf_overrides, own.allowed_media_domains)


def test_values_of_the_environment_are_not_shown_by_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start shows no values of the environment, whatever part of it is wrong."""
    monkeypatch.setenv("SECRET", "canary-secret")
    for line in (
        "lora_modules: [{name: x, path: '${SECRET}/a'}]",
        "max_model_len: '${SECRET}'",
        "tool_call_parser: '${SECRET}'",
    ):
        with pytest.raises(ConfigError) as caught:
            launch(f"models: {{a: {{model: LLAMA, {line}}}}}", tmp_path)
        assert "canary" not in caught.value.message, line


def test_defaults_are_settings_of_every_model(tmp_path: Path) -> None:
    """Defaults apply to every model: above the command line, below the model's own settings."""
    text = """
        defaults: {max_model_len: 256, max_num_seqs: 4}
        models:
          common: {model: LLAMA}
          own: {model: LLAMA, max_model_len: 512}
    """
    common, own = launch(text, tmp_path, "--max-model-len", "128").models

    assert [256, 512] == [m.vllm_config.model_config.max_model_len for m in (common, own)]
    assert [4, 4] == [m.vllm_config.scheduler_config.max_num_seqs for m in (common, own)]


def test_a_mistake_in_defaults_is_named_there(tmp_path: Path) -> None:
    """A mistake in defaults is named there: a key unknown to vLLM, or a value that it refuses."""
    with pytest.raises(
        ConfigError, match=r"defaults: unknown key 'max_model_length'; did you mean"
    ):
        launch("{defaults: {max_model_length: 3}, models: {a: {model: LLAMA}}}", tmp_path)


def test_variables_of_a_model_are_set_while_its_configuration_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's variables are set while its configuration is made, then the server's return."""
    monkeypatch.setenv("QUANT_CONFIG", "/server.json")
    (tmp_path / "quant.json").write_text("{}")
    text = """
        models:
          file: {model: LLAMA, quant_config: quant.json}
          cleared: {model: LLAMA, quant_config: null}
          kept: {model: LLAMA}
    """
    seen = []

    def spy(args: argparse.Namespace) -> object:
        seen.append(os.environ.get("QUANT_CONFIG"))
        return engine_config(args)

    monkeypatch.setattr("vllm_hotswap.launch.prepare.engine_config", spy)
    made = launch(text, tmp_path).models

    assert [str(tmp_path / "quant.json"), None, "/server.json"] == seen
    assert "/server.json" == os.environ["QUANT_CONFIG"]
    assert [{"QUANT_CONFIG": seen[0]}, {"QUANT_CONFIG": None}, {}] == [m.variables for m in made]


MISTAKES = {
    "max_model_length: 512": "unknown key 'max_model_length'; did you mean 'max_model_len'?",
    "max_model_len: many": "max-model-len",
    "max_model_len: 999999": "max_model_len",
    "port: 80": "'port' is a setting of the server",
    "served_model_name: other": "put additional names into 'aliases'",
    "enable_auto_tool_choice: true": "requires --tool-call-parser",
    "tool_call_parser: hermse": "tool_call_parser 'hermse' is not known",
    "chat_template: /no/such/file.jinja": "/no/such/file.jinja",
    "enforce_eager: 3": "enforce-eager",
    "tensor_parallel_size: true": "tensor",
    "data_parallel_size: 2": "--data-parallel-size above 1 is not supported",
    "lora_modules: [a=/b]": "adapter 'a' cannot be used: it is not a folder (/b)",
    "reasoning_parser: deepsek": "reasoning_parser 'deepsek' is not known",
    "{max_model_len: 8, max-model-len: 9}": "'max_model_len' is given twice",
    "shutdown_timeout: 3": "'shutdown_timeout' is a setting of the server",
    "logging_config: {log_requests: true}": "'logging_config' is a setting of the server",
    "ignore_patterns: [a, --tool-parser-plugin=b]": "begins with a dash",
    "chat_template: ~nobody-has-this-name/x": "is not a valid path",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_names_the_model_and_the_setting(line: str, tmp_path: Path) -> None:
    """A mistake names the model and the setting on one line."""
    settings = line if line.startswith("{") else f"{{{line}}}"
    text = f"models:\n  llama:\n    <<: {settings}\n    model: LLAMA\n"
    with pytest.raises(ConfigError) as caught:
        launch(text, tmp_path)

    assert MISTAKES[line] in caught.value.message
    assert "models.llama" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max-modle-len", "5"], "--max-modle-len"),
        (["other.yaml"], "other.yaml"),
        (["--api-server-count", "2"], "--api-server-count"),
        (["--data-parallel-size", "2"], "--data-parallel-size"),
        (["--lora-modules", "a=/b"], "--lora-modules"),
        (["--reasoning-parser", "deepsek"], "reasoning_parser 'deepsek' is not known"),
    ],
)
def test_a_flag_that_cannot_work_is_named(flags: list[str], expected: str, tmp_path: Path) -> None:
    """A flag that cannot work is named before any engine is made."""
    with pytest.raises(ConfigError, match=expected):
        launch("models: {llama: {model: LLAMA}}", tmp_path, *flags)


def test_weights_of_a_gguf_file_are_its_size(tmp_path: Path) -> None:
    """The weights of a GGUF file count as its size, because it is the whole checkpoint."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 1000)

    assert 1000 == weights_bytes(ModelConfig(alias="a", model=str(file)), None)


def file_flag(parser: argparse.ArgumentParser) -> str:
    """Return the flag of a logging configuration; up to vLLM 0.30 there is only the older one."""
    newer = "--logging-config.pylogging_config_file"
    return newer if "--logging-config" in parser.format_help() else "--log-config-file"


def test_vllms_logging_flags_reach_uvicorn(tmp_path: Path) -> None:
    """vLLM's logging flags reach uvicorn: quiet paths, or a configuration that leaves our log."""
    file = tmp_path / "log.json"
    file.write_text('{"version": 1}')
    parser = serve_parser("test")

    def made_of(*flags: str) -> dict[str, object] | None:
        return uvicorn_log_config(parser.parse_args(list(flags)))

    quiet = made_of("--disable-access-log-for-endpoints", "/health,/metrics")
    whole = made_of(file_flag(parser), str(file))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # from vLLM 0.31 on
        old = made_of("--log-config-file", str(file))

    assert None is made_of()
    assert ["/health", "/metrics"] == quiet["filters"]["access_log_filter"]["excluded_paths"]  # type: ignore[index]
    assert {"version": 1, "disable_existing_loggers": False} == whole == old


@pytest.mark.parametrize("text", [None, "not JSON", "[]"])
def test_a_logging_configuration_that_cannot_be_used_is_named(
    text: str | None, tmp_path: Path
) -> None:
    """An unusable logging configuration is named; vLLM itself would continue without it."""
    file = tmp_path / "log.json"
    if text is not None:
        file.write_text(text)
    parser = serve_parser("test")

    with pytest.raises(ConfigError, match="--log-config-file"):
        uvicorn_log_config(parser.parse_args([file_flag(parser), str(file)]))


def make_certificate(key: str, certificate: str) -> None:
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=x -keyout {key}"
    subprocess.run([*command.split(), "-out", certificate], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
async def test_certificates_are_loaded_and_watched(tmp_path: Path) -> None:
    """vLLM's own watcher reloads certificates into the context that the server uses."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make_certificate(key, certificate)
    given = flags(ssl_keyfile=key, ssl_certfile=certificate, uds=str(tmp_path / "s"))
    listener = Listener.open(given)
    config = listener.uvicorn_config(Starlette())
    listener.close()

    watcher = certificate_refresher(config)

    assert config.ssl is watcher.ssl
    assert [key, certificate] == [watcher.key_path, watcher.cert_path]
    watcher.stop()


def test_nothing_of_media_is_cached_where_requests_wait(tmp_path: Path) -> None:
    """Where requests wait, media are not cached: one that gives up would leave a cache hole."""
    text = "models: {llama: {model: LLAMA}}\n"
    [manual] = launch(text, tmp_path).models
    [auto] = launch(text + "switching: {mode: auto}", tmp_path).models
    assert (4, 0) == (manual.args.mm_processor_cache_gb, auto.args.mm_processor_cache_gb)


def test_the_version_is_vllms() -> None:
    """`/version` answers vLLM's version."""
    assert import_module("vllm").__version__ == vllm_version()


def test_every_flag_of_vllm_that_names_code_is_known_as_such() -> None:
    """Every flag that names code is known: words in its name show a later vLLM's new one."""
    suspicious = re.compile(r"cls|class|plugin|module|middleware|processors|custom|import|hook")
    harmless = {
        "custom_histogram_buckets",
        "disable_custom_all_reduce",
        "lora_modules",
        "lora_target_modules",
        "max_lora_cls_labels",
    }
    named = {name for name in model_flags(serve_parser("test")) if suspicious.search(name)}

    assert (
        named - {key for key, *_ in code_keys(dict.fromkeys(named, "a.b"))} <= harmless
    )  # not in all versions
