"""Advisories from a folder in the form of the Open Source Vulnerabilities (OSV) schema.

PyPA's advisory database is such a folder, one YAML or JSON file for each advisory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version

from tools.audit.advisories import Advisory, within
from tools.audit.record import RecordError
from tools.setup import canonical

END = {"fixed": "<", "last_affected": "<="}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def advisories_in(folder: Path, packages: frozenset[str]) -> Iterator[Advisory]:
    """Return the advisories on these packages; those that were withdrawn are left out.

    Raises:
        RecordError: one of them cannot be read.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".yaml", ".json"}:
            try:
                yield from list(_read(path, packages))
            except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
                what = " ".join(str(error).split()) or type(error).__name__
                raise RecordError(
                    f"{path} is not an advisory in the OSV format: {what}; correct or remove it"
                ) from None


def _read(path: Path, packages: frozenset[str]) -> Iterator[Advisory]:
    text = path.read_text(encoding="utf-8")
    if not any(name in text.lower().replace("_", "-").replace(".", "-") for name in packages):
        return  # most are about others, and YAML is slow to read
    entry = json.loads(text) if path.suffix == ".json" else yaml.load(text, LOADER)  # noqa: S506
    if isinstance(entry, dict) and "withdrawn" not in entry:
        yield from from_osv(entry, packages)


def from_osv(entry: Mapping[str, Any], packages: frozenset[str]) -> Iterator[Advisory]:
    """Return what one entry of the OSV schema says about these packages.

    A version is affected if it is in a range or in `versions`, as the schema has it ("Evaluation").

    Raises:
        ValueError: a range begins with something that is not a version.
    """
    for about in entry.get("affected", []):
        package = about.get("package", {})
        name = canonical(package.get("name", ""))[0]
        if package.get("ecosystem") == "PyPI" and name in packages:
            ranges = [it for it in about.get("ranges", []) if it.get("type") == "ECOSYSTEM"]
            spans = [span for it in ranges for span in _spans(it["events"])]
            named = [
                f"=={version}"
                for version in filter(is_version, about.get("versions", []))
                if not any(within(version, span) for span in spans)
            ]
            yield Advisory(
                name,
                entry["id"],
                tuple(entry.get("aliases", [])),
                (*spans, *named),
                tuple(
                    event["fixed"] for it in ranges for event in it["events"] if "fixed" in event
                ),
            )


def _spans(events: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Return version specifiers from events in order: introduced, then fixed or last affected."""
    since, is_open = "", False
    for event in events:
        ((kind, version),) = event.items()
        if kind == "introduced":
            if not is_version(version):
                raise ValueError(f"introduced in {version!r}, which is not a version")
            since, is_open = "" if version == "0" else f">={version},", True
        elif is_open and kind in END and is_version(version):
            yield f"{since}{END[kind]}{version}"
            is_open = False
    if is_open:
        yield since.rstrip(",") or ">=0"


def is_version(text: str) -> bool:
    """Return whether Python's rules read it. Ranges that end in anything else count as open."""
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True
