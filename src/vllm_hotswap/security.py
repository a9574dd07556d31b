"""What the configuration may not do unless the operator says so on the command line.

The YAML file says which code runs: `trust_remote_code` runs what comes with a checkpoint, and
several arguments of vLLM name classes and files that are imported. Whoever can write the file
could say so, too; that is why the permission is no key of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_hotswap.errors import ConfigError, ConfigMistakes, Mistake
from vllm_hotswap.trusted_files import read_trusted
from vllm_hotswap.written import Place

ALLOW_VARIABLE = "VLLM_HOTSWAP_ALLOW"

CUSTOM_CLASS = "custom_class"
"""The method of speculative decoding whose model is the name of a class."""

DANGERS: Mapping[str, str] = {
    "trust_remote_code": "models whose `trust_remote_code` is true in the file",
    "code": "settings in the file that name code to be imported (`worker_cls`, plugins, "
    "`middleware`, `logits_processors`, ...) or run what a model writes (`tool_server: demo`)",
    "world_writable": "a YAML file that other users of the machine own, may write or may replace",
}
"""What may be allowed, by its name in `--allow`, and what that accepts."""

_NAMES_CODE = re.compile(
    r"(^|_)(cls|class|classes|plugin|module_path|logits_processors|middleware|"
    r"class_overrides|inductor_passes|custom_passes)$"
)
_NO_CODE = frozenset(["splitting_ops"])
"""Nested keys whose values have dots and are names of operators."""

_QUALIFIED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:\w+)?")


def parse_allowed(words: Iterable[str]) -> frozenset[str]:
    """The dangers that are accepted, from words that may hold several, separated by commas.

    Raises:
        ConfigError: one of them is not known.
    """
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    for name in names:
        if name not in DANGERS:
            raise ConfigError(f"--allow {name!r} is not known; known: {', '.join(DANGERS)}")
    return frozenset(names)


def read_models_file(path: Path, allowed: frozenset[str]) -> bytes:
    """The content of a file that decides which code runs.

    Raises:
        ConfigError: somebody else may write or replace it, and that is not allowed.
        OSError: it cannot be read.
    """
    return read_trusted(
        path,
        f"configuration file {str(path)!r}",
        hatch=", or start with --allow world_writable: it decides which code runs",
        is_checked="world_writable" not in allowed,
    )


def check_settings(
    settings: Mapping[str, Any], place: Callable[..., Place], allowed: frozenset[str]
) -> None:
    """Refuse settings of one model that run code nobody has allowed.

    Args:
        settings: the model's flags of vLLM.
        place: where a key stands, by the way to it.
        allowed: what the operator accepts.

    Raises:
        ConfigMistakes: names every such setting.
    """
    found = [
        Mistake(place(*keys).line, f"{place(*keys)} {why}")
        for keys, why in _dangers(settings, allowed)
    ]
    if found:
        raise ConfigMistakes(found)


def _dangers(
    settings: Mapping[str, Any], allowed: frozenset[str]
) -> Iterator[tuple[list[str], str]]:
    """The way to each setting that runs code nobody has allowed, and what to do about it."""
    named = {key.replace("-", "_"): value for key, value in settings.items()}
    if named.get("trust_remote_code") and "trust_remote_code" not in allowed:
        why = "if you have read it, start with --allow trust_remote_code"
        yield ["trust_remote_code"], f"runs code that comes with the checkpoint; {why}"
    if "code" not in allowed:
        why = "if that is wanted, start with --allow code"
        for key in code_keys(named):
            yield key.split("."), f"names code that the server would run; {why}"


def code_keys(settings: Mapping[str, Any]) -> Iterator[str]:
    """The keys, nested ones too, whose value names code."""
    for key, value in settings.items():
        if value in (None, "", [], {}, "auto"):
            continue
        if _NAMES_CODE.search(key) or _is_code(key, value):
            yield key
        else:
            yield from (f"{key}{inner}" for inner in _nested(_parsed(value)))


def _nested(value: object) -> Iterator[str]:
    """Where code is named inside a value: vLLM imports what several such keys name."""
    if isinstance(value, list):
        for item in value:
            yield from _nested(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            key = str(name).replace("-", "_")
            if item in (None, "", [], {}) or key in _NO_CODE:
                continue
            if _NAMES_CODE.search(key) or _is_qualified(item) or item == CUSTOM_CLASS:
                yield f".{key}"
            else:
                yield from (f".{key}{inner}" for inner in _nested(item))


def _is_code(key: str, value: object) -> bool:
    if key == "tool_server":
        return value == "demo"
    if value == CUSTOM_CLASS:  # of speculative decoding
        return True
    return key.endswith("_backend") and _is_qualified(value)


def _is_qualified(value: object) -> bool:
    """Whether a value reads like the qualified name of a class, and not like a file's name."""
    if not isinstance(value, str) or not _QUALIFIED.fullmatch(value):
        return False
    return not value.endswith((".json", ".yaml", ".yml", ".safetensors", ".gguf", ".txt"))


def _parsed(value: object) -> object:
    """A text that vLLM reads as JSON, as it reads it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
