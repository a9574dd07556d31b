"""What a service on the network knows now: asked by PyPA's pip-audit, in its own environment."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.audit.advisories import Advisory, Pinned
from tools.setup import SetupError, canonical, install_list

SERVICES = ("osv", "pypi")
"""pip-audit's names: the database of open source vulnerabilities, and the package index itself."""

KNOWN = ("flask", "0.5")
"""A version with published vulnerabilities: some indexes answer that no version has any."""


class NotReached(Exception):
    """No service could be asked, or none of them knows anything; the message has their answers."""


def pip_audit(folder: Path) -> Path:
    """Return the program; install the pinned version where it is missing.

    Raises:
        NotReached: it can't be installed here.
    """
    try:
        install_list(folder, "audit.txt")
    except SetupError as error:
        raise NotReached(str(error)) from None
    return folder / "bin" / "pip-audit"


def ask(program: Path, pins: Iterable[Pinned]) -> tuple[str, list[Advisory], list[Pinned]]:
    """Ask the services in turn; the first one that knows the advisories counts.

    Returns:
        The service, its advisories on these very versions, and the versions that it knows.

    Raises:
        NotReached: none of them answered with what it should know.
    """
    asked = list(pins)
    said = []
    for service in SERVICES:
        answer, words = _run(program, service, asked)
        if answer is None:
            said.append(f"{service}: {words}")
        elif not answer.get(KNOWN, ()):
            said.append(f"{service}: knows nothing, not even about {KNOWN[0]} {KNOWN[1]}")
        else:
            known = [pin for pin in asked if answer.get((pin.published_as, pin.public)) is not None]
            return service, [it for found in answer.values() for it in found or ()], known
    raise NotReached("; ".join(said))


Answer = dict[tuple[str, str], list[Advisory] | None]


def _run(program: Path, service: str, pins: Iterable[Pinned]) -> tuple[Answer | None, str]:
    """Return one service's advisories by name and version; no value for an unknown version.

    Or nothing, and the last line of pip-audit's output.
    """
    lines = {f"{pin.published_as}=={pin.public}" for pin in pins}
    found: Answer = {}
    for batch in _without_doubles([*sorted(lines), "==".join(KNOWN)]):
        with tempfile.TemporaryDirectory() as folder:
            listed = Path(folder) / "requirements.txt"
            listed.write_text("\n".join(batch) + "\n")
            words = [str(program), "--requirement", str(listed), "--no-deps", "--disable-pip"]
            words += ["--vulnerability-service", service, "--format", "json"]
            done = subprocess.run(
                [*words, "--progress-spinner", "off"], capture_output=True, text=True, check=False
            )
        try:
            found |= dict(_versions(json.loads(done.stdout), batch))
        except ValueError:
            said = done.stderr.strip().splitlines()
            return None, said[-1].partition("(")[
                0
            ] if said else f"pip-audit ended with {done.returncode}"
    return found, ""


def _without_doubles(lines: Iterable[str]) -> list[list[str]]:
    """Yield the lines in batches in which each package is once: pip-audit refuses others."""
    batches: list[dict[str, str]] = []
    for line in lines:
        name = line.partition("==")[0]
        free = next((batch for batch in batches if name not in batch), None)
        if free is None:
            batches.append(free := {})
        free[name] = line
    return [list(batch.values()) for batch in batches]


def _versions(answer: Mapping[str, Any], batch: Iterable[str]) -> Iterable[tuple[Any, Any]]:
    """Yield what pip-audit's JSON says of each version; those that it skipped have no value."""
    asked = dict(canonical(line) for line in batch)
    for it in answer["dependencies"]:
        name = canonical(it["name"])[0]
        version = it.get("version", asked.get(name, ""))
        found = None if "skip_reason" in it else [_advisory(name, version, v) for v in it["vulns"]]
        yield (name, version), found


def _advisory(name: str, version: str, said: Mapping[str, Any]) -> Advisory:
    """Return an advisory on one version; pip-audit does not say which others it is about."""
    return Advisory(
        name, said["id"], tuple(said["aliases"]), (f"=={version}",), tuple(said["fix_versions"])
    )
