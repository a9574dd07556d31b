"""Misspelt flags of `vllm serve`, found without the seconds that importing vLLM takes.

Certain mistakes are reported at once. All others are left to vLLM's own parser.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from vllm_hotswap.config import SCHEMA
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.hints import did_you_mean
from vllm_hotswap.host import RUN_ON
from vllm_hotswap.launch.flags import SERVER_FLAGS

NO_KEYS = frozenset(["help", "model", "model_tag", "served_model_name"])
"""Flags that are neither in the schema nor flags of the server as a whole."""

PLUGINS = "vllm.platform_plugins"
"""Entry points of packages that may add flags to vLLM's parser."""


def known_flags() -> frozenset[str]:
    """Return the long flags of `vllm serve`, with underscores."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return frozenset(schema["$defs"]["flags"]) | SERVER_FLAGS | NO_KEYS


def refuse_misspelt(words: Sequence[str], own: Iterable[str] = ()) -> None:
    """Refuse a flag that the installed vLLM certainly lacks, if it has one with a similar name.

    Args:
        words: the words that are left for vLLM's parser.
        own: flags of this command that are not vLLM's, such as `--admin-key`.

    Raises:
        ConfigError: names the flag and the nearest one.
    """
    if not any(word.startswith("--") for word in words) or not _is_known_vllm():
        return
    known = known_flags()
    for flag in _unknown(words, known):
        if hint := nearest_flag(flag, [*known, *own]):
            raise ConfigError(f"unrecognized arguments: {flag}{hint}")


def refuse_unknown(words: Sequence[str]) -> None:
    """Refuse flags that the newest supported vLLM does not have; for use without vLLM.

    Args:
        words: flags with their values; the values are not checked.

    Raises:
        ConfigError: names the first such word, and the nearest flag.
    """
    if words and not words[0].startswith("-"):
        raise ConfigError(f"unrecognized arguments: {words[0]}")
    known = known_flags()
    for flag in _unknown(words, known):
        raise ConfigError(f"unrecognized arguments: {flag}{nearest_flag(flag, known)}")


def nearest_flag(flag: str, known: Iterable[str]) -> str:
    """Return `; did you mean '--x'?`, or nothing if no flag is near."""
    return did_you_mean(flag, [f"--{name.lstrip('-').replace('_', '-')}" for name in known])


def explained(message: str) -> str:
    """Return a message of vLLM's parser, with the nearest flag if it does not know one."""
    found = re.match(r"unrecognized arguments: (--[\w-]+)", message)
    if found is None or "did you mean" in message:
        return message
    return message + nearest_flag(found.group(1), known_flags())


def _unknown(words: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """Yield flags that no known flag begins with: argparse accepts abbreviations, too."""
    for word in words:
        if match := re.match(r"--(?:no-)?([\w-]+)", word):
            name = match.group(1).replace("-", "_")
            if not any(flag.startswith(name) for flag in known):
                yield word.partition("=")[0]


def _is_known_vllm() -> bool:
    """Whether vLLM's flags are those of the schema: that release, no package that adds flags."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None or entry_points(group=PLUGINS):
        return False
    try:
        text = (Path(spec.origin).parent / "_version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.search(r"version = '(\d+\.\d+\.\d+)", text)
    return found is not None and found.group(1) == RUN_ON[-1]
