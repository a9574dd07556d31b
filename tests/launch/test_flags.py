"""Settings of a model as flags: all mistakes with their lines, and unchanged values."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NoReturn

import pytest

from vllm_hotswap.config.reader import load_config, read_config
from vllm_hotswap.errors import ConfigError, ConfigMistakes
from vllm_hotswap.launch.flags import model_words, setting_mistakes


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def optional_text(value: str) -> str | None:
    return value or None


@pytest.fixture
def parser() -> Parser:
    """A parser with flags of each kind that vLLM has."""
    parser = Parser()
    parser.add_argument("--revision")
    parser.add_argument("--code-revision", type=optional_text)
    parser.add_argument("--dtype", choices=["auto", "float32"], type=str)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
    parser.add_argument("--disable-log-stats", action="store_true")
    parser.add_argument("--hf-overrides", type=json.loads)
    parser.add_argument("--ignore-patterns", nargs="+", type=str)
    parser.add_argument("--sizes", nargs="+", type=int)
    parser.add_argument("--middleware", action="append", type=str)
    return parser


def words(parser: Parser, folder: Path, settings: str) -> list[str]:
    """Return a model's settings, in YAML, as words of the command line."""
    path = folder / "models.yaml"
    path.write_text(f"models: {{a: {{model: org/a, {settings}}}}}")
    (model,) = load_config(path, allowed=frozenset(["code"])).models
    return [word for given in model_words(parser, model, path).values() for word in given]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("revision: 1.10", "--revision=1.10"),
        ("revision: 0123456", "--revision=0123456"),
        ("revision: 1:30", "--revision=1:30"),
        ("revision: 2024-01-01", "--revision=2024-01-01"),
        ("revision: 1e3", "--revision=1e3"),
        ("revision: 0x1F", "--revision=0x1F"),
        ("revision: no", "--revision=no"),
        ("revision: .inf", "--revision=.inf"),
        ("code_revision: 7.0", "--code-revision=7.0"),
        ("code_revision: 1_000", "--code-revision=1_000"),
        ("ignore_patterns: [1.10, 0512, off]", "--ignore-patterns 1.10 0512 off"),
        ("middleware: [1.10, 010]", "--middleware=1.10 --middleware=010"),
    ],
)
def test_a_flag_that_wants_a_text_gets_what_was_written(
    parser: Parser, tmp_path: Path, setting: str, expected: str
) -> None:
    """A flag for text gets what was written, whatever YAML makes of it."""
    assert expected.split() == words(parser, tmp_path, setting)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("max_model_len: 512", "--max-model-len=512"),
        ("max_model_len: 0x200", "--max-model-len=512"),
        ("gpu_memory_utilization: 0.50", "--gpu-memory-utilization=0.50"),
        ("gpu_memory_utilization: 5e-1", "--gpu-memory-utilization=5e-1"),
        ("enforce_eager: yes", "--enforce-eager"),
        ("enforce_eager: off", "--no-enforce-eager"),
        ("disable_log_stats: on", "--disable-log-stats"),
        ("disable_log_stats: no", ""),
        ("sizes: [1, 2]", "--sizes 1 2"),
        ("max_model_len: null", ""),
    ],
)
def test_a_number_and_a_switch_are_what_they_say(
    parser: Parser, tmp_path: Path, setting: str, expected: str
) -> None:
    """Numbers and switches become flags of their value, and null becomes vLLM's default."""
    assert expected.split() == words(parser, tmp_path, setting)


def test_a_mapping_is_json(parser: Parser, tmp_path: Path) -> None:
    """A mapping becomes JSON, with numbers as numbers, and keys as they were written."""
    (word,) = words(parser, tmp_path, "hf_overrides: {rope_theta: 1e6, id2label: {0: a, no: b}}")

    assert {"rope_theta": 1e6, "id2label": {"0": "a", "no": "b"}} == json.loads(
        word.removeprefix("--hf-overrides=")
    )


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("max_model_len: 0512", "max_model_len is 0512, which YAML reads as 330; write 330, or"),
        ("max_model_len: 1:30", "max_model_len is 1:30, which YAML reads as 90; write 90"),
        ("max_model_len: 1_000", "max_model_len is 1_000, which YAML reads as 1000; write 1000"),
        ("max_model_len: yes", "max_model_len is yes, which YAML reads as true; write true, or"),
        ("max_model_len: 1e3", "max_model_len: argument --max-model-len: invalid int value: '1e3'"),
        ("gpu_memory_utilization: .nan", "gpu_memory_utilization is .nan, which YAML reads as nan"),
        ("enforce_eager: 010", "enforce_eager is 010, which YAML reads as 8; write 8"),
        ("sizes: [1, 010]", "sizes.1 is 010, which YAML reads as 8; write 8, or '010' in quotes"),
        ("hf_overrides: {a: {lang: no}}", "hf_overrides.a.lang is no, which YAML reads as false;"),
        ("hf_overrides: {a: [010]}", "hf_overrides.a.0 is 010, which YAML reads as 8; write 8"),
        ("hf_overrides: no", "hf_overrides is no, which YAML reads as false; write false"),
        ("revision: true", "revision is true; vLLM needs a value for --revision"),
    ],
)
def test_a_surprising_value_is_refused_by_name(
    parser: Parser, tmp_path: Path, setting: str, expected: str
) -> None:
    """A value that YAML would turn into something else is refused by name."""
    with pytest.raises(ConfigMistakes) as caught:
        words(parser, tmp_path, setting)

    assert f"models.yaml:1: models.a.{expected}" in caught.value.message


def test_all_mistakes_of_all_models_are_found(parser: Parser, tmp_path: Path) -> None:
    """Mistakes in keys and values of all models are found, even of unusable ones."""
    path = tmp_path / "models.yaml"
    path.write_text(
        "defaults:\n"
        "  revison: x\n"
        "models:\n"
        "  a:\n"
        "    model: ./gone\n"
        "    max_model_length: 1\n"
        "    max-model-len: many\n"
        "    port: 80\n"
        "  b: {model: org/b, dtype: float99, sizes: [1, x]}\n"
    )
    read = read_config(path)
    assert read.config is not None

    found = ConfigMistakes(setting_mistakes(parser, read.config.models, path)).message

    expected = [
        "2: defaults: unknown key 'revison'; did you mean 'revision'?",
        "6: models.a: unknown key 'max_model_length'; did you mean 'max_model_len'?",
        "7: models.a.max_model_len: argument --max-model-len: invalid int value: 'many'",
        "8: models.a: 'port' is a setting of the server; give it as a flag",
        "9: models.b.dtype: argument --dtype: invalid choice: 'float99'",
        "9: models.b.sizes: argument --sizes: invalid int value: 'x'",
    ]
    lines = [line.removeprefix(f"{path}:") for line in found.splitlines()]
    assert expected == [line[: len(start)] for line, start in zip(lines, expected, strict=True)]


def test_a_path_keeps_the_name_of_its_link(parser: Parser, tmp_path: Path) -> None:
    """A path keeps its link's name in every value that begins with `./` or `../`, at any depth."""
    (tmp_path / "blob").touch()
    (tmp_path / "over.json").symlink_to("blob")

    given = words(parser, tmp_path, "revision: ./over.json, hf_overrides: {a: [../x, ./over.json]}")

    here = tmp_path.resolve()
    assert [
        f"--revision={here / 'over.json'}",
        f"--hf-overrides={json.dumps({'a': [str(here.parent / 'x'), str(here / 'over.json')]})}",
    ] == given


def test_a_chat_template_keeps_the_name_of_its_link(parser: Parser, tmp_path: Path) -> None:
    """A chat template keeps the name of its link, as every file that the YAML names does."""
    parser.add_argument("--chat-template")
    (tmp_path / "blob").touch()
    (tmp_path / "chat.jinja").symlink_to("blob")

    assert [f"--chat-template={tmp_path.resolve() / 'chat.jinja'}"] == words(
        parser, tmp_path, "chat_template: chat.jinja"
    )
