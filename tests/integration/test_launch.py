"""From YAML keys to vLLM's own configuration: names, types, precedence, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_hotswap.config import load_config
from vllm_hotswap.demo import MODELS, write
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch import Launch, parse_flags, prepare


def launch(text: str, folder: Path, *flags: str) -> Launch:
    """Everything that a start does before it makes an engine."""
    path = folder / "models.yaml"
    path.write_text(text.replace("LLAMA", str(MODELS / "llama")))
    config = load_config(path)
    return prepare(config, parse_flags(config, flags))


def test_every_key_of_the_quickstarts_example_reaches_vllm(tmp_path: Path) -> None:
    """Engine arguments and frontend settings, each for its own model."""
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
    """Also for a switch that the command line turned on."""
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


def test_structured_values_pass_through(tmp_path: Path) -> None:
    """Mappings become JSON, lists become several values, null leaves the default."""
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


def test_a_chat_template_beside_the_file_is_found(tmp_path: Path) -> None:
    """A relative path counts from the YAML file; inline Jinja is left alone."""
    (tmp_path / "short.jinja").write_text("{{ messages }}")
    text = """
        models:
          file: {model: LLAMA, chat_template: short.jinja}
          inline: {model: LLAMA, chat_template: "{{ messages }}"}
    """
    file, inline = launch(text, tmp_path).models

    assert str(tmp_path / "short.jinja") == file.args.chat_template
    assert "{{ messages }}" == inline.args.chat_template


MISTAKES = {
    "max_model_length: 512": "unknown key 'max_model_length'; did you mean 'max_model_len'?",
    "max_model_len: many": "max-model-len",
    "max_model_len: 999999": "max_model_len",
    "port: 80": "'port' is a setting of the server",
    "served_model_name: other": "the alias is the served name",
    "enable_auto_tool_choice: true": "requires --tool-call-parser",
    "tool_call_parser: hermse": "tool_call_parser 'hermse' is not known",
    "chat_template: /no/such/file.jinja": "/no/such/file.jinja",
    "enforce_eager: 3": "enforce-eager",
    "tensor_parallel_size: true": "tensor",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_names_the_model_and_the_setting(line: str, tmp_path: Path) -> None:
    """On one line."""
    text = f"models:\n  llama:\n    model: LLAMA\n    {line}\n"
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
    ],
)
def test_a_flag_that_cannot_work_is_named(flags: list[str], expected: str, tmp_path: Path) -> None:
    """Before any engine is made."""
    with pytest.raises(ConfigError, match=expected):
        launch("models: {llama: {model: LLAMA}}", tmp_path, *flags)
