"""What the configuration may not do unless the operator allows it on the command line.

The YAML file decides which code runs: `trust_remote_code` runs code that comes with a checkpoint,
and several arguments of vLLM name classes and files to import. Whoever can write the file could
allow it there, too; so the permission is not a key of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_hotswap.config.code_settings import CODE, code_keys, trusting_keys
from vllm_hotswap.config.written import Place
from vllm_hotswap.errors import ConfigError, ConfigMistakes, Mistake
from vllm_hotswap.system import read_trusted

ALLOW_VARIABLE = "VLLM_HOTSWAP_ALLOW"

PERMISSIONS: Mapping[str, str] = {
    "trust_remote_code": "models whose `trust_remote_code` is true in the file",
    "code": "settings in the file that name code to be imported (`worker_cls`, plugins, "
    "`middleware`, `logits_processors`, ...), load compiled code (`cache_dir`), or run what a "
    "model writes (`tool_server: demo`)",
    "world_writable": "a YAML file that other users of the machine own, may write or may replace",
}
"""What may be allowed, by its name in `--allow`, and what that permits."""


def parse_allowed(words: Iterable[str]) -> frozenset[str]:
    """Return the allowed dangers; a word may hold several names, separated by commas.

    Raises:
        ConfigError: one of them is not known.
    """
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    for name in names:
        if name not in PERMISSIONS:
            raise ConfigError(f"--allow {name!r} is not known; known: {', '.join(PERMISSIONS)}")
    return frozenset(names)


def read_models_file(path: Path, allowed: frozenset[str]) -> bytes:
    """Return the content of a file that decides which code runs.

    Raises:
        ConfigError: another user may write or replace it, and that is not allowed.
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
    """Refuse settings of one model that run code without permission.

    Args:
        settings: the model's flags of vLLM.
        place: where a key is in the file, by its path.
        allowed: what the operator accepts.

    Raises:
        ConfigMistakes: names every such setting.
    """
    found = [
        Mistake(place(*keys).line, f"{place(*keys)} {why}")
        for keys, why in _unpermitted(settings, allowed)
    ]
    if found:
        raise ConfigMistakes(found)


def without_unpermitted(settings: Mapping[str, Any], allowed: frozenset[str]) -> dict[str, Any]:
    """Return the settings without those that run code without permission.

    vLLM's parser creates objects from what it parses, and so may run code that they name.
    """
    refused = {keys[0] for keys, _ in _unpermitted(settings, allowed)}
    return {key: value for key, value in settings.items() if key.replace("-", "_") not in refused}


def _unpermitted(
    settings: Mapping[str, Any], allowed: frozenset[str]
) -> Iterator[tuple[list[str], str]]:
    """Yield the path of each setting that runs code without permission, and what to do about it."""
    if "trust_remote_code" not in allowed:
        why = "if you have reviewed it, start with --allow trust_remote_code"
        for keys in trusting_keys(settings):
            yield keys, f"runs code that comes with the checkpoint; {why}"
    if "code" not in allowed:
        for keys in code_keys(settings):
            yield keys, f"names code that the server would run; {_next_step(keys)}"


def _next_step(keys: list[str]) -> str:
    step = "if that is intended, start with --allow code"
    is_declared = len(keys) == 1 or keys[-1] in CODE
    return step if is_declared else f"{step}; if it is a file, put ./ or its folder before it"
