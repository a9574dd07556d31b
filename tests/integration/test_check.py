"""`vllm-hotswap check`: what can be known without loading a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_hotswap.config import SCHEMA
from vllm_hotswap.demo.quickstart import MODELS, write
from vllm_hotswap.host.vllm_versions import vllm_version

MIB = 1 << 20

MISTAKES: dict[str, tuple[str, str]] = {
    "settings: {max_modle_len: 3}": ("settings", "did you mean 'max_model_len'?"),
    "length: {max_model_len: 999999}": ("config.json", "max_model_len"),
    "parser: {tool_call_parser: hermse}": ("settings", "'hermse' is not known"),
    "tokens: {tool_call_parser: deepseek_v3}": ("parsers", "could not locate tool call"),
    "template: {chat_template: bad.jinja}": ("chat template", "endfor"),
    "raising: {chat_template: raising.jinja}": ("chat template", "no such thing"),
}
"""A model's alias and settings, with the step that fails and its message."""

BROKEN = {
    "truncated": ("weights", "model.safetensors"),
    "no-weights": ("weights", "no weight files"),
    "no-tokenizer": ("tokenizer", "no tokenizer.json in '"),
    "bad-config": ("config.json", "['LamaForCausalLM'] are not supported for now; the nearest"),
    "list-config": (
        "config.json",
        "list-config/config.json' cannot be read: it is not a JSON object",
    ),
    "odd-config": ("config.json", "`architectures` must be a list of names"),
    "cut-generation": ("config.json", "generation_config.json' cannot be read: "),
    "list-tokenizer": ("tokenizer", "tokenizer.json' cannot be read: it is not a JSON object"),
}
"""Checkpoints that cannot be loaded."""


def check(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return command("check", *arguments, **environment)


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_hotswap", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )


def break_checkpoints(folder: Path) -> None:
    for name in BROKEN:
        shutil.copytree(MODELS / "llama", folder / name)
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "no-weights" / "model.safetensors").unlink()
    for path in (folder / "no-tokenizer").glob("tokenizer*"):
        path.unlink()
    config = folder / "bad-config" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LamaForCausalLM"))
    for name, file, text in (
        ("list-config", "config", "[1]"),
        ("odd-config", "config", '{"architectures": 5}'),
        ("cut-generation", "generation_config", '{"top_k": '),
        ("list-tokenizer", "tokenizer", "[]"),
    ):
        (folder / name / f"{file}.json").write_text(text)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Check good models and every mistake, once."""
    folder = tmp_path_factory.mktemp("check")
    path = write(folder)
    break_checkpoints(folder)
    (folder / "bad.jinja").write_text("{% for message in messages %}")
    (folder / "raising.jinja").write_text("{{ raise_exception('no such thing') }}")
    lines = [f"  {key.replace(': {', ': {model: ./llama, ')}" for key in MISTAKES]
    lines += [f"  {name}: {{model: ./{name}}}" for name in BROKEN]
    lines += ["  gone:", "    model: ./gone", "    max_model_length: 3"]
    path.write_text(path.read_text() + "\n".join(lines))

    ended = check(path, "--json", "--memory-device", "2GiB")

    assert 1 == ended.returncode, ended.stderr
    assert "checking: reading vLLM's flags ..." in ended.stderr
    assert f"checking llama (1 of {4 + len(MISTAKES) + len(BROKEN)}) ..." in ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    assert found["problems"] == ["memory: skipped until the errors are fixed"]
    return found


@pytest.fixture(scope="module")
def report(found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found out about each model."""
    return {model["alias"]: model for model in found["models"]}


@pytest.mark.parametrize("alias", ["llama", "qwen", "embed"])
def test_nothing_is_wrong_with_the_demos_models(report: dict[str, Any], alias: str) -> None:
    """The demo's models, generating and embedding, pass."""
    assert {} == report[alias]["problems"]
    assert report[alias]["weights_bytes"] > 0


@pytest.mark.parametrize(
    ("alias", "step", "cause"),
    [(key.split(":")[0], *expected) for key, expected in MISTAKES.items()]
    + [(alias, *expected) for alias, expected in BROKEN.items()],
)
def test_every_mistake_is_told(report: dict[str, Any], alias: str, step: str, cause: str) -> None:
    """Every mistake is reported, not only the first, each with the step that found it."""
    problems = report[alias]["problems"]

    assert cause in problems[step][0]
    assert len(problems[step][0]) < 1000
    assert "\n" not in problems[step][0]


def test_mistakes_are_told_in_the_order_of_the_file(found: dict[str, Any]) -> None:
    """Mistakes in the YAML, flags and files are reported together, by line, in the file's order."""
    lines = [mistake["line"] for mistake in found["mistakes"]]
    messages = [mistake["message"] for mistake in found["mistakes"]]

    assert sorted(lines) == lines
    assert all(
        f"models.yaml:{line}: " in message for line, message in zip(lines, messages, strict=True)
    )
    assert ": models.gone.model: the folder" in messages[-2]
    assert messages[-1].endswith(
        "models.gone: unknown key 'max_model_length'; did you mean 'max_model_len'?"
    )


def test_memory_is_planned_when_every_model_is_known(tmp_path: Path) -> None:
    """With every model known, memory is planned as at a start, in a table, with status 0."""
    path = write(tmp_path)
    path.write_text(path.read_text().replace("    kv_cache_memory_bytes: 64M\n", "", 1))

    ended = check("--memory-device", "3GiB", path)
    rows = {line.split()[0]: line.split() for line in ended.stdout.splitlines()}

    assert 0 == ended.returncode, ended.stdout + ended.stderr
    assert ["generate", "2048", "ok"] == [rows["qwen"][column] for column in (1, 2, -1)]
    assert "64.0" == rows["qwen"][5]
    assert float(rows["llama"][5]) > 64
    assert "memory for models" in ended.stdout


def test_models_that_cannot_fit_are_told(tmp_path: Path) -> None:
    """Models that cannot fit are reported with the arithmetic, before anything is loaded."""
    path = write(tmp_path)
    path.write_text(
        path.read_text().replace("kv_cache_memory_bytes: 64M", "kv_cache_memory_bytes: 9G")
    )

    ended = check(path, VLLM_HOTSWAP_MEMORY_DEVICE="4GiB")

    assert 1 == ended.returncode
    assert "error: memory: model 'llama' can never be loaded: " in ended.stdout


def test_a_file_that_is_wrong_itself_is_one_line(tmp_path: Path) -> None:
    """A file that is itself wrong is one line, and nothing else is checked."""
    path = tmp_path / "models.yaml"
    path.write_text("modles: {}")

    ended = check(path)

    assert 1 == ended.returncode
    assert "did you mean 'models'?" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.wide
def test_a_start_tells_all_mistakes(tmp_path: Path) -> None:
    """A start reports all mistakes: a missing model hides no vLLM key and no other section."""
    path = tmp_path / "models.yaml"
    path.write_text(
        "models:\n  a:\n    model: ./gone\n    max_model_length: 3\nmemory: {devices: 1GiB}\n"
    )

    ended = command("serve", path)

    assert 1 == ended.returncode
    *_, first, second, third = ended.stderr.splitlines()
    assert first.startswith(f"vllm-hotswap: error: {path}:3: models.a.model: the folder ")
    assert f"{path}:4: models.a: unknown key 'max_model_length'; did you mean 'max_model_len'?" == (
        second
    )
    assert f"{path}:5: memory: unknown key 'devices'; did you mean 'device'?" == third


@pytest.mark.wide
@pytest.mark.skipif(vllm_version() != "0.32.0", reason="each version has its own flags")
def test_the_schema_that_ships_has_the_flags_of_vllm() -> None:
    """The shipped schema has the flags of vLLM; `make reference` renews it."""
    ended = subprocess.run(
        [sys.executable, "-m", "vllm_hotswap", "schema"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )

    assert SCHEMA.read_text() == ended.stdout
