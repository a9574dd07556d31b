"""Remove names, addresses, folders and secrets of the check's user and machine from texts."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import pwd
import re
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

ROOT = Path(__file__).resolve().parents[2]

FOLDERS = ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "HF_HOME", "VLLM_CACHE_ROOT", "TMPDIR")
"""Environment variables that name folders, with colons between them."""

USERS = ("LOGNAME", "USER", "LNAME", "USERNAME", "SUDO_USER")
EVERYBODYS = {"root", "localhost", "user", "nobody"}
"""Names of users and machines that identify no one."""

PACKAGES = {
    *("vllm", "gaudi", "hpu", "hotswap", "habana", "habanalabs", "intel", "torch", "plugin"),
    *("neural", "compressor", "pt", "transformers", "platform", "python", "check", "llama", "qwen"),
}
"""Words of what is checked. They are kept, even if a user has such a name: without them no line
could be read."""

KEPT = EVERYBODYS | PACKAGES

_KEYS = """
check ok wrong notes seconds
python versions driver commit is_changed package_is_the_clones variables
count name has_rng_state before with_256_mib after follows mem_get_info
platform device_type told status body tokens furthest_logprob steps_compared
models memory device host budget used base others
residency weights_bytes kv_bytes held device_bytes host_bytes
way model away back_s furthest_of_its_own
free total memory_allocated memory_reserved
told_device_bytes told_host_bytes processes threads descriptors memory_bytes
cycles grown lately
llama qwen vllm vllm-gaudi vllm-hotswap torch habana-torch-plugin neural-compressor-pt
transformers
"""
KEYS = frozenset(_KEYS.split())
"""Keys of the file that are the check's own. They identify no one, and are kept, even if a user has
such a name."""

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|_(PASS|PWD|AUTH)$", re.IGNORECASE)
CREDENTIALS = re.compile(r"//(?:[^/\s'\"@:]*:\S*|[^/\s'\"]+)@")
"""The part of a web address before its host: a user and a password, or a token. A password may have
any character but white space, an `@` too, so all up to the last one is taken for it."""

COLOURS = re.compile(r"(?:\x1b|\\x1b|\\u001b|\\033)\[[0-9;?]*[A-Za-z]", re.IGNORECASE)
"""ECMA-48's control sequences, also as JSON and `repr` escape them. Otherwise their last character
would count as part of the word that follows."""

ESCAPES = (r"\\[abfnrtv0]", r"\\x[0-9A-Fa-f]{2}", r"\\u[0-9A-Fa-f]{4}", "%[0-9A-Fa-f]{2}")
"""What stands for a character in JSON, `repr` and addresses, and ends in a letter or a digit."""

BEGINS = f"(?:(?<![A-Za-z0-9])|{'|'.join(f'(?<={escape})' for escape in ESCAPES)})"
ENDS = "(?![A-Za-z0-9])"

_WORD = r"[^/\s'\":,;)%\\]+"
HOMES = re.compile(
    rf"(?:/|%2F)(?:home|Users)(?:/|%2F)(?:{_WORD}(?:[ ']{_WORD}){{1,3}}(?=/)|{_WORD})",
    re.IGNORECASE,
)
"""Home folders of any user. A name with spaces or apostrophes is known by the slash after it."""

DOMAIN = r"(?:(?:\.[a-z0-9-]+){2,})?"
"""This machine's domain, where it follows its name."""

LEAST_SECRET = 6
"""Characters. A shorter value would be found in words that have nothing to do with it."""


class Blank:
    """Replace each name of this machine and user with a word that stands for it."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Collect what the system reports now, and `environment`."""
        words: dict[str, str] = {}
        for text, word in _known(environment):
            for written in _written(text):
                words.setdefault(written, word)
        longest_first = sorted(words, key=len, reverse=True)
        self._words = [words[text] for text in longest_first]
        patterns = [f"({_pattern(text, words[text])})" for text in longest_first]
        self._pattern = re.compile("|".join(patterns), re.IGNORECASE)

    def text(self, text: str) -> str:
        """Return the text blanked, without colours, too."""
        plain = COLOURS.sub("", text)
        known = self._pattern.sub(lambda found: self._words[(found.lastindex or 0) - 1], plain)
        return HOMES.sub("<home>", CREDENTIALS.sub("//<secret>@", known))

    def all(self, value: Any) -> Any:
        """Return a JSON value with each text blanked, and each key that is not in `KEYS`."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                key if key in KEYS else self.text(str(key)): self.all(each)
                for key, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.all(each) for each in value]
        return value


ESCAPING: tuple[Callable[[str], str], ...] = (
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: ascii(text)[1:-1],
)


def _written(text: str) -> set[str]:
    """Return a text as it is, and as JSON, `repr` and addresses have it; forms may be nested."""
    found = {text}
    for _ in range(2):
        found |= {way(each) for each in found for way in ESCAPING}
    return found | {quote(text, safe="", errors="replace"), quote(text, errors="replace")}


def _pattern(text: str, word: str) -> str:
    """Return a pattern of a text that isn't a part of a longer word. A secret is found in any."""
    if word == "<secret>":
        return re.escape(text)
    before = BEGINS if text[0].isalnum() else ""
    domain = DOMAIN if word == "<host>" and "." not in text and ":" not in text else ""
    after = ENDS if text[-1].isalnum() else ""
    return before + re.escape(text) + domain + after


def _known(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from ((value, "<secret>") for value in _secrets(environment))
    yield from _folders([ROOT], "<clone>")
    yield from _folders([sysconfig.get_path("purelib")], "<packages>")
    yield from _folders([sys.prefix, sys.exec_prefix, sys.base_prefix], "<python>")
    named = [folder for name in FOLDERS for folder in environment.get(name, "").split(":")]
    yield from _folders(named, "<folder>")
    yield from _folders([tempfile.gettempdir()], "<temporary>")
    yield from _folders(_homes(environment), "<home>")
    yield from _folders([Path.cwd()], "<here>")
    for names, word in ((_hosts(), "<host>"), (_users(environment), "<user>")):
        yield from ((name, word) for name in names if name and name.lower() not in KEPT)


def _folders(folders: Iterable[Path | str], word: str) -> Iterator[tuple[str, str]]:
    """Yield folders as written, and as resolved. `/usr` identifies no one and is in most paths."""
    for folder in folders:
        if str(folder).startswith("/"):
            for path in (Path(folder), Path(os.path.realpath(folder))):  # a loop of links, too
                if path not in (Path("/"), Path("/usr")):
                    yield str(path), word


def _homes(environment: Mapping[str, str]) -> Iterator[str]:
    yield environment.get("HOME", "")
    with contextlib.suppress(KeyError):
        yield pwd.getpwuid(os.getuid()).pw_dir


def _hosts() -> Iterator[str]:
    for name in (socket.gethostname(), platform.node(), socket.getfqdn()):
        yield name
        yield name.partition(".")[0]
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            name = address.address.partition("%")[0]
            if not name.startswith("127.") and name not in ("::1", "00:00:00:00:00:00"):
                yield name


def _users(environment: Mapping[str, str]) -> Iterator[str]:
    yield from (environment.get(name, "") for name in USERS)
    with contextlib.suppress(KeyError, OSError):
        yield pwd.getpwuid(os.getuid()).pw_name
    with contextlib.suppress(KeyError, OSError):
        yield getpass.getuser()


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield secrets whole, stripped, and each of their words: `Bearer ...` has two."""
    for name, value in environment.items():
        if SECRET.search(name):
            parts = (value, value.strip(), *value.split())
            yield from (part for part in parts if len(part) >= LEAST_SECRET)
