"""`make audit`: which of the pinned versions have published vulnerabilities.

Asks a service on the network, and reads the record of the day when that was last done; where no
service can be reached, the record alone. The record covers few packages: versions that were never
looked up are named, and do not fail unless `--strict` is given.

Exits with 0 if only accepted vulnerabilities are known, with 1 if others are, with 2 if a file
cannot be used, and with `--strict` also with 2 if a version was not looked up.
"""

from __future__ import annotations

import argparse
import datetime as dt
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.audit.advisories import (
    Accepted,
    Advisory,
    Pinned,
    findings,
    pinned_in,
    unneeded,
)
from tools.audit.database import advisories_in
from tools.audit.record import (
    Record,
    RecordError,
    load,
    load_accepted,
    looked_up,
    written,
)
from tools.audit.services import NotReached, ask, pip_audit
from tools.setup import LISTS, ROOT, canonical, parse

ENVIRONMENT = ROOT / ".venv-audit"
SHOWN = 8


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    pins = pinned_in(
        {
            path.name: [canonical(it.requirement) for it in parse(path.read_text())]
            for path in args.lists
        }
    )
    try:
        accepted = load_accepted(args.accepted)
        known = Knowledge(pins)
        if args.database:
            known.read_database(args.database, args.source)
        elif not args.offline:
            known.ask_service()
        if args.record:
            return known.write(args.advisories)
        known.read_record(load(args.advisories))
    except RecordError as error:
        print(f"audit: error: {error}", file=sys.stderr)
        return 2
    return report(known, accepted, args.strict)


class Knowledge:
    """What is known of some pinned versions, gathered from one place after the other."""

    def __init__(self, pins: Sequence[Pinned]) -> None:
        self.pins = pins
        self.advisories: list[Advisory] = []
        self.known: set[Pinned] = set()
        self.source = ""

    def ask_service(self) -> None:
        """Ask a service on the network; where none is reached, print that and learn nothing."""
        try:
            service, self.advisories, known = ask(pip_audit(ENVIRONMENT), self.pins)
        except NotReached as error:
            print(f"audit: no service was reached ({error}); using only the record")
            return
        self.source = f"{service}, by pip-audit"
        self.known.update(known)
        print(f"audit: {self.source}, knows {len(known)} of {len(self.pins)} pinned versions")

    def read_database(self, folder: Path, source: str) -> None:
        """Read a folder of advisories in the OSV form; an empty one is an error."""
        names = frozenset(pin.published_as for pin in self.pins)
        self.advisories = list(advisories_in(folder, names))
        if not self.advisories:
            raise RecordError(f"{folder} has no advisory on any of the {len(names)} packages")
        self.source = source
        self.known.update(self.pins)

    def read_record(self, record: Record) -> None:
        """Add what was recorded."""
        recorded = [pin for pin in self.pins if record.has(pin)]
        self.advisories += record.advisories
        self.known.update(recorded)
        age = (dt.datetime.now(dt.UTC).date() - record.recorded).days
        print(
            f"audit: record of {record.recorded} ({age} days old; {record.source}), "
            f"has {len(recorded)} of {len(self.pins)} pinned versions"
        )

    def write(self, path: Path) -> int:
        """Write the record from what is known; return an exit code."""
        if not self.known:
            print("audit: error: nothing to record; the record is unchanged", file=sys.stderr)
            return 2
        there = [it for it in self.advisories if any(it.concerns(pin) for pin in self.known)]
        today = dt.datetime.now(dt.UTC).date()
        path.write_text(written(Record(today, self.source, looked_up(self.known), tuple(there))))
        print(f"audit: {len(there)} advisories on {len(self.known)} versions are recorded")
        return 0


def report(known: Knowledge, accepted: Sequence[Accepted], is_strict: bool) -> int:
    """Print what was found; return an exit code. A strict one is not 0 if a version is unknown."""
    found = findings(known.pins, known.advisories)
    bad = [it for it in found if not any(decision.covers(it) for decision in accepted)]
    for decision in accepted:
        covered = [finding for finding in found if decision.covers(finding)]
        for pin in dict.fromkeys(finding.pinned for finding in covered):
            ids = ", ".join(it.advisory.id for it in covered if it.pinned == pin)
            print(f"audit: accepted: {pin.name} {pin.version}: {ids}: {decision.reason}")
    for package, name in unneeded(accepted, found):
        print(f"audit: accepted.toml has {package} {name}, which is no longer needed")
    unknown = [pin for pin in known.pins if pin not in known.known]
    if unknown:
        print(f"audit: nothing is known of {listed(unknown)}: run make audit-record with a network")
    for finding in bad:
        print(f"audit: {finding}", file=sys.stderr)
    print(f"audit: {len(bad)} to do, {len(found) - len(bad)} accepted, {len(unknown)} not known")
    if bad:
        return 1
    if unknown and is_strict:
        print(
            f"audit: error: {len(unknown)} versions were not looked up, and --strict is given: "
            "run make audit-record with a network",
            file=sys.stderr,
        )
        return 2
    return 0


def listed(pins: Sequence[Pinned]) -> str:
    """Return some of these pins by name, and how many there are."""
    names = ", ".join(f"{pin.name} {pin.version}" for pin in pins[:SHOWN])
    return f"{names} and {len(pins) - SHOWN} others" if len(pins) > SHOWN else names


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="audit",
        description="List known vulnerabilities of the pins. Versions that were not looked up are "
        "listed, but are not failures: the record covers few packages.",
        epilog="Exit codes: 0 if all known vulnerabilities are accepted; 1 if one is not; 2 if a "
        "file cannot be used, or, with --strict, a version was not looked up.",
    )
    parser.add_argument("lists", nargs="*", type=Path, metavar="LIST", help="default: all of them")
    parser.add_argument(
        "--offline", action="store_true", help="read only the record, without a network"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail (2) if a version was not looked up"
    )
    parser.add_argument("--record", action="store_true", help="rewrite the record")
    parser.add_argument("--database", type=Path, help="a folder of advisories in the OSV format")
    parser.add_argument("--source", default="a database", help="name of that folder in the record")
    parser.add_argument("--advisories", type=Path, default=LISTS / "advisories.toml")
    parser.add_argument("--accepted", type=Path, default=LISTS / "accepted.toml")
    args = parser.parse_args(argv)
    args.lists = args.lists or sorted(LISTS.glob("*.txt"))
    return args


if __name__ == "__main__":
    sys.exit(main())
