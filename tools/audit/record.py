"""The advisories as they were looked up on some day, so that they are known without a network.

`requirements/advisories.toml` has them, and which versions they were looked up for: for others it
says nothing. `requirements/accepted.toml` has those that were decided on.
"""

from __future__ import annotations

import datetime as dt
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from tools.audit.advisories import Accepted, Advisory, Pinned

HEAD = """\
# The published vulnerabilities of the versions that the lists pin, as of the day below.
# `make audit` reads this in addition to a service on the network, or alone without one.
# `make audit-record` rewrites it. It says nothing about versions that looked_up lacks.
"""


class RecordError(Exception):
    """A file of the record can't be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """What was looked up when, where, for which versions, and what was found.

    `looked_up` has the versions of each package, under the name that its advisories have.
    """

    recorded: dt.date
    source: str
    looked_up: Mapping[str, tuple[str, ...]]
    advisories: tuple[Advisory, ...]

    def has(self, pinned: Pinned) -> bool:
        """Return whether anything was looked up for this version."""
        return pinned.public in self.looked_up.get(pinned.published_as, ())


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: the file is not there, or has another form.
    """
    content = _toml(path)
    try:
        return Record(
            content["recorded"],
            content["source"],
            {name: tuple(versions) for name, versions in content["looked_up"].items()},
            tuple(
                Advisory(
                    it["package"],
                    it["id"],
                    tuple(it["aliases"]),
                    tuple(it["affected"]),
                    tuple(it["fixed"]),
                )
                for it in content.get("advisory", [])
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path.name}: {error!r}; rewrite it with make audit-record") from None


def load_accepted(path: Path) -> list[Accepted]:
    """Read what was accepted.

    Raises:
        RecordError: the file is not there, or an entry lacks its reason or something else.
    """
    accepted = []
    for entry in _toml(path).get("accepted", []):
        try:
            it = Accepted(
                entry["package"],
                tuple(entry["ids"]),
                SpecifierSet(entry["versions"]),
                entry["reason"].strip(),
            )
        except KeyError as error:
            raise RecordError(f"{path.name}: an entry has no {error}: {entry}") from None
        except InvalidSpecifier as error:
            raise RecordError(f"{path.name}: {error}; versions are as in '>=1.0,<1.4'") from None
        if not it.reason:
            raise RecordError(f"{path.name}: {it.package} has no reason; say why it is good enough")
        accepted.append(it)
    return accepted


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path.name} can't be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecordError(f"{path.name} is not TOML: {error}") from None


def written(record: Record) -> str:
    """Return a record as the text of its file."""
    lines = [
        HEAD,
        f"recorded = {record.recorded.isoformat()}",
        f"source = {json.dumps(record.source)}",
        "",
        "[looked_up]",
        *(f"{name} = {json.dumps(list(them))}" for name, them in sorted(record.looked_up.items())),
    ]
    for it in sorted(record.advisories, key=lambda it: (it.package, it.id)):
        lines += [
            "",
            "[[advisory]]",
            f"package = {json.dumps(it.package)}",
            f"id = {json.dumps(it.id)}",
            f"aliases = {json.dumps(list(it.aliases))}",
            f"affected = {json.dumps(list(it.affected))}",
            f"fixed = {json.dumps(list(it.fixed))}",
        ]
    return "\n".join(lines) + "\n"


def looked_up(pins: Iterable[Pinned]) -> dict[str, tuple[str, ...]]:
    """Return what a record covers, from the pins that were looked up."""
    found: dict[str, set[str]] = {}
    for pinned in pins:
        found.setdefault(pinned.published_as, set()).add(pinned.public)
    return {name: tuple(sorted(versions)) for name, versions in found.items()}
