"""Write the hashes of the lists in requirements/ again: `make hashes`.

Each line gets those of the files that it may be installed from on Linux (x86-64 and Arm), with
CPython 3.11 to 3.14: its wheels, and its source archive only where one of these has no wheel. They
are read from the indexes that pip is configured with, in both forms that indexes have: JSON (PEP
691) and HTML (PEP 503). No file is downloaded; one that is on this machine is read.

Trust: every later installation is checked against what the indexes say on the day when this runs.
So a file to which two of them give different hashes is an error. A change of hashes whose version
stays is shown line by line, for the author of the commit to explain.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import ssl
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import httpx
from packaging.markers import Marker
from packaging.tags import Tag
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

from tools.setup import LISTS, NEWEST, OLDEST, Pin, parse, pip_settings

JSON = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
PROCESSORS = ("x86_64", "aarch64")
TARGETS = [
    (minor, processor) for minor in range(OLDEST[1], NEWEST[1] + 1) for processor in PROCESSORS
]
WORKERS = 8


class HashError(Exception):
    """The hashes of a line can't be found; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of an index page: name, address, and SHA-256 (hex; None if the page has none)."""

    name: str
    url: str
    sha256: str | None


# Index pages


def read_page(text: str, kind: str, base: str) -> list[File]:
    """Return the files that an index page names.

    Args:
        text: the page.
        kind: its media type; JSON, or else HTML.
        base: where it came from, for addresses that are relative to it.
    """
    if kind.partition(";")[0].strip().endswith("json"):
        return [
            File(it["filename"], urljoin(base, it["url"]), it["hashes"].get("sha256"))
            for it in json.loads(text)["files"]
        ]
    page = _Anchors(base)
    page.feed(text)
    return page.files


class _Anchors(HTMLParser):
    """The links of an HTML page; a hash is in the part behind the `#`."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        self.files: list[File] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if tag == "base" and target:
            self.base = urljoin(self.base, target)
        if tag == "a" and target:
            url, fragment = urldefrag(urljoin(self.base, target))
            found = re.search(r"(?:^|&)sha256=([0-9a-f]{64})\b", fragment)
            name = unquote(urlsplit(url).path.rpartition("/")[2])
            self.files.append(File(name, url, found and found[1]))


# Which files count


def files_for(pin: Pin, files: Iterable[File]) -> list[File]:
    """Yield the files of a pin's very version that one of the targets would install."""
    wheels: dict[File, frozenset[Tag]] = {}
    archives = []
    for file in files:
        match _contents(file.name):
            case name, version, frozenset() as tags if _is(pin, name, version):
                wheels[file] = tags
            case name, version, None if _is(pin, name, version):
                archives.append(file)
            case _:
                pass
    targets = [target for target in TARGETS if _wants(pin, target)]
    chosen = {f for f, tags in wheels.items() for target in targets if _any_fits(tags, target)}
    covered = [any(_any_fits(wheels[file], target) for file in chosen) for target in targets]
    if not all(covered):
        chosen |= set(archives)
    return sorted(chosen, key=lambda file: file.name)


def _contents(filename: str) -> tuple[str, Version, frozenset[Tag] | None] | None:
    """Return name, version and tags of a file; no tags for a source archive, None for others."""
    try:
        if filename.endswith(".whl"):
            name, version, _, tags = parse_wheel_filename(filename)
            return name, version, tags
        name, version = parse_sdist_filename(filename)
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None
    return name, version, None


def _is(pin: Pin, name: str, version: Version) -> bool:
    requirement = pin.requirement.partition(" ;")[0]
    return name == pin.name and version == Version(requirement.partition("==")[2])


def _wants(pin: Pin, target: tuple[int, str]) -> bool:
    """Return whether a target installs a pin at all, by its marker."""
    marker = pin.requirement.partition(" ;")[2]
    minor, processor = target
    return not marker or Marker(marker).evaluate(
        {
            "python_version": f"3.{minor}",
            "python_full_version": f"3.{minor}.0",
            "platform_machine": processor,
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }
    )


def _any_fits(tags: frozenset[Tag], target: tuple[int, str]) -> bool:
    return any(_fits(tag, *target) for tag in tags)


def _fits(tag: Tag, minor: int, processor: str) -> bool:
    """Return whether CPython 3.MINOR on a Linux with glibc installs wheels of this tag."""
    built_for = re.fullmatch(r"(cp|py)3(\d*)", tag.interpreter)
    if built_for is None:
        return False
    if tag.platform != "any" and not (
        tag.platform.startswith(("manylinux", "linux_")) and tag.platform.endswith(processor)
    ):
        return False
    python, least = built_for[1], int(built_for[2] or 0)
    if tag.abi == f"cp3{minor}" or (python == "cp" and tag.abi == "none"):
        return least == minor
    return tag.abi in {"abi3", "none"} and least <= minor


# Sources of the pages


class Indexes:
    """The places where pip looks for packages, in its order: indexes, then find-links.

    Messages name none of them: what they say may be kept, and addresses may hold a password.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        default = [] if settings.get("no-index") else [settings.get("index-url") or pips_default()]
        extra = [] if settings.get("no-index") else settings.get("extra-index-url", "").split()
        self._indexes = [*default, *extra]
        self._links = settings.get("find-links", "").split()
        self._client = httpx.Client(
            verify=ssl.create_default_context(cafile=settings.get("cert")),
            proxy=settings.get("proxy") or None,
            timeout=float(settings.get("timeout", 60)),
            follow_redirects=True,
            headers={"Accept": ACCEPT},
        )

    def hashes(self, pin: Pin) -> tuple[str, ...]:
        """Return the SHA-256 of each file that counts for a pin.

        Taken from the first place that has one; the others may only agree. A build with a local
        version (`+cpu`), which no common index has, keeps its hashes where no place has it.

        Raises:
            HashError: no place has the version, or two of them differ.
        """
        found: dict[str, str] = {}
        for place in self._places(pin.name):
            here = {file.name: hash_of(file) for file in files_for(pin, self._files(place))}
            for name in here.keys() & found.keys():
                if here[name] != found[name]:
                    raise HashError(
                        f"{name}: two of pip's indexes give different hashes; find out which of "
                        "them has the author's file, and remove the other from pip's configuration"
                    )
            found = found or here
        if not found and is_local(pin) and pin.hashes:
            return pin.hashes
        if not found:
            raise HashError(
                f"{pin.requirement}: no index that pip is configured with has a file for Linux"
            )
        return tuple(dict.fromkeys(found[name] for name in sorted(found)))

    def _places(self, name: str) -> list[str]:
        return [*(f"{index.rstrip('/')}/{name}/" for index in self._indexes), *self._links]

    def _files(self, place: str) -> list[File]:
        """Return what a page or a folder names; nothing where there is none."""
        path = local(place)
        if path is not None:
            if (path / "index.html").is_file():
                return read_page(
                    (path / "index.html").read_text(), "text/html", f"{path.as_uri()}/"
                )
            return [File(it.name, it.as_uri(), None) for it in path.glob("*") if it.is_file()]
        try:
            answer = self._client.get(place)
        except httpx.HTTPError as error:
            raise HashError(
                f"one of pip's indexes does not answer ({type(error).__name__})"
            ) from None
        if answer.status_code == 404:
            return []
        if answer.status_code != 200:
            raise HashError(f"one of pip's indexes answers {answer.status_code}")
        return read_page(answer.text, answer.headers.get("Content-Type", ""), str(answer.url))


def pips_default() -> str:
    """Return pip's default index without a configuration; only pip's own code has it."""
    url: str = importlib.import_module("pip._internal.models.index").PyPI.simple_url
    return url


def local(place: str) -> Path | None:
    """Return the folder that an address or a path names; None if it is not on this machine."""
    parts = urlsplit(place)
    if parts.scheme in {"", "file"}:
        return Path(unquote(parts.path))
    return None


def hash_of(file: File) -> str:
    """Return the SHA-256 that a page gives to a file, or that of the file itself if it is here."""
    if file.sha256:
        return file.sha256
    path = local(file.url)
    if path is None:
        raise HashError(f"{file.name}: its index has no SHA-256 for it")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Lists


def rewritten(text: str, hashes: Mapping[str, tuple[str, ...]]) -> str:
    """Return a list with other hashes, by requirement; comments and order stay."""
    blocks = re.split(r"(?<!\\)\n", text.rstrip("\n"))
    lines = []
    for block in blocks:
        pins = parse(block)
        lines += [str(Pin(it.requirement, hashes[it.requirement])) for it in pins] or [block]
    return "\n".join(lines) + "\n"


def with_other_builds(pin: Pin, found: tuple[str, ...]) -> tuple[str, ...]:
    """Return the hashes of a build with a local version (`+cpu`), those in the list first.

    Such builds are on no common index, and a folder of find-links may have one wheel of several.
    """
    return tuple(dict.fromkeys([*pin.hashes, *found])) if is_local(pin) else found


def is_local(pin: Pin) -> bool:
    """Return whether a pin's version is that of one build (`+cpu`)."""
    return "+" in pin.requirement.partition(" ;")[0]


def changes(pin: Pin, found: tuple[str, ...]) -> str | None:
    """Return what to report of a line that had hashes and has others now."""
    gone, new = set(pin.hashes) - set(found), set(found) - set(pin.hashes)
    if not pin.hashes or not (gone or new):
        return None
    return f"{pin.requirement}: {len(gone)} hashes removed, {len(new)} new, for the same version"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hashes", description="Rewrite the hashes of the lists.")
    parser.add_argument("lists", nargs="*", type=Path, metavar="LIST", help="default: all of them")
    paths = parser.parse_args(argv).lists or sorted(LISTS.glob("*.txt"))
    texts = {path: path.read_text() for path in paths}
    pins = [pin for text in texts.values() for pin in parse(text)]
    try:
        hashes = look_up(Indexes(pip_settings(Path(sys.executable))), pins)
    except HashError as error:
        print(f"hashes: error: {error}", file=sys.stderr)
        return 1
    for line in filter(None, (changes(pin, hashes[pin.requirement]) for pin in pins)):
        print(f"hashes: {line}")
    for path, text in texts.items():
        path.write_text(rewritten(text, hashes))
    print(f"hashes: {len(hashes)} packages in {len(paths)} lists")
    return 0


def look_up(indexes: Indexes, pins: Iterable[Pin]) -> dict[str, tuple[str, ...]]:
    """Return the hashes of each requirement, each looked up once."""
    wanted = {pin.requirement: pin for pin in pins}
    with ThreadPoolExecutor(WORKERS) as pool:
        found = dict(zip(wanted, pool.map(indexes.hashes, wanted.values()), strict=True))
    return {name: with_other_builds(pin, found[name]) for name, pin in wanted.items()}


if __name__ == "__main__":
    sys.exit(main())
