"""The JSON schema of the YAML file: it accepts what the server accepts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vllm_hotswap.config.reader import parse_config
from vllm_hotswap.config.settings import SECTIONS, ModelKeys
from vllm_hotswap.demo.quickstart import write
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch.schema import json_schema

FLAGS = argparse.ArgumentParser()
FLAGS.add_argument("--max-model-len", type=int, help="Longest\n  sequence. In tokens.")
FLAGS.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
FLAGS.add_argument("--dtype", choices=["auto", "half"])
FLAGS.add_argument("--middleware", nargs="+")
FLAGS.add_argument("--hf-overrides", type=json.loads)
FLAGS.add_argument("--traces", nargs="+", choices=["model", "worker", None])


def schema() -> dict[str, Any]:
    return json_schema({action.dest: action for action in FLAGS._actions if action.dest != "help"})


def mistakes(text: str, made: dict[str, Any] | None = None) -> list[str]:
    validator = jsonschema.Draft7Validator(made or schema())
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


def test_it_is_a_schema() -> None:
    """The schema is valid in its dialect, with and without vLLM's flags."""
    jsonschema.Draft7Validator.check_schema(schema())
    jsonschema.Draft7Validator.check_schema(json_schema())


@pytest.mark.parametrize(
    "text",
    [
        "models: {a: {model: x}}",
        "models: {a: {model: x, max_model_len: 4k, enforce_eager: true, dtype: half}}",
        "models: {a: {model: x, max_model_len: null, middleware: [], hf_overrides: {a: 1}}}",
        "models: {a: {model: '${M}', enforce_eager: '${EAGER:-true}', pinned: '${PIN:-true}'}}",
        "models: {a: {model: x, aliases: [b], load: on_demand, idle_sleep: 3, idle_unload: null}}",
        "models: {a: {model: x, sampling: {defaults: {seed: 1}, drop: [n]}, quant_config: null}}",
        "models: {a: {model: x, traces: [model, worker]}}\nswitching:\nmemory:",
        "models: {a: {model: x, sampling: {drop_unsupported: '${B:-true}'}}}",
        "defaults: {max_model_len: 3, pinned: true}\nmodels: {a: {model: x}}",
        "models: {a: {model: x}}\nrights: {team: {keys: ['${K}'], switch_to: [a]}, default: {}}",
        "models: {a: {model: x}}\nrights:\n  jobs: {key_file: f, switch_to: all, max_priority: 9}",
        "models: {a: {model: x}}\nmemory: {device: 20GiB, host: 0.5}\nswitching: {max_wait: 1}",
    ],
)
def test_what_the_server_accepts_is_accepted(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema accepts what the server accepts."""
    monkeypatch.setenv("M", "org/model")
    monkeypatch.setenv("K", "key")
    parse_config(yaml.safe_load(text), Path("models.yaml"))

    assert [] == mistakes(text)


@pytest.mark.parametrize(
    "text",
    [
        "models: {}",
        "models: {a: {}}",
        "default: a\nmodels: {a: {model: x}}",
        "models: {a: {model: x, load: later}}",
        "models: {a: {model: x, idle_sleep: 0}}",
        "models: {a: {model: x, aliases: b}}",
        "models: {a: {model: x, sampling: {defalts: {}}}}",
        "models: {a: {model: x}}\nswitching: {drain_timeout: -1}",
        "models: {a: {model: x}}\nmemory: {gpu: 1}",
        "models: {a: {model: x}}\nrights: {team: {keys: k}}",
        "models: {a: {model: x}}\nrights: {team: {keys: [k], switch_to: a}}",
        "models: {a: {model: x}}\nrights: {team: {keys: [k], max_priority: 101}}",
        "defaults: {aliases: [b]}\nmodels: {a: {model: x}}",
    ],
)
def test_what_the_server_refuses_is_refused(text: str) -> None:
    """The schema refuses what the server refuses, so an editor shows it."""
    with pytest.raises(ConfigError):
        parse_config(yaml.safe_load(text), Path("models.yaml"))

    assert [] != mistakes(text)


@pytest.mark.parametrize(
    "text",
    [
        "models: {a: {model: x, max_modle_len: 3}}",
        "models: {a: {model: x, dtype: quarter}}",
        "models: {a: {model: x, enforce_eager: 3}}",
    ],
)
def test_flags_of_vllm_are_known(text: str) -> None:
    """vLLM's flags are known by name, and by value as far as argparse tells; else all keys pass."""
    assert [] != mistakes(text)
    assert [] == mistakes(text, json_schema())


def test_every_setting_is_described() -> None:
    """Every setting has a description for editors."""
    definitions = schema()["$defs"]

    assert {f.name for f in ModelKeys.__dataclass_fields__.values()} <= set(  # type: ignore[attr-defined]
        definitions["model"]["properties"]
    )
    for name in (*SECTIONS, "group", "SamplingPolicy"):
        for key, value in definitions[name]["properties"].items():
            assert value["description"], key
    assert "Longest sequence." == definitions["flags"]["max_model_len"]["description"]


def test_the_demo_comes_with_its_schema(tmp_path: Path) -> None:
    """An editor finds the demo's schema by the first line of the YAML file."""
    text = write(tmp_path).read_text()
    name = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")

    assert [] == mistakes(text, json.loads((tmp_path / name).read_text()))
