"""Compare what we use with what a version has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tools.vllm_seams.declared import Seam
from tools.vllm_seams.imports import imports_in
from tools.vllm_seams.routes import handlers_in, routes_in
from tools.vllm_seams.settings import settings_in
from tools.vllm_seams.tree import Signature, Tree
from tools.vllm_seams.uses import Call, Override, Use, Uses


@dataclass(frozen=True, slots=True)
class Problem:
    """A name that the version lacks, or has in another way."""

    what: str
    why: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" + (f" ({self.place})" if self.place else "")


@dataclass(frozen=True, slots=True)
class Known:
    """What we decide by hand for each version."""

    places: Mapping[str, Mapping[str, str]]
    """`host.vllm_names.PLACES`."""
    optional: frozenset[str]
    """Names that are used only where they exist."""
    routes: frozenset[str]
    """`METHOD /path` of all routes that are answered or refused on purpose."""
    handlers: Mapping[str, tuple[str, ...]]
    """`engines.frontend.HANDLERS`: path -> names in the state of vLLM's applications."""
    state: frozenset[str]
    """Additional names in that state that we read."""
    made_by_us: frozenset[str]
    """Constructors that only we call, so that ours may take any parameters."""
    is_decided: Callable[[str], bool] = bool
    """Return whether a decision exists if the setting of this name names code."""
    imports: frozenset[str] = frozenset()
    """Functions that import what they get, where it is known what reaches them."""


def problems(
    tree: Tree, version: tuple[int, ...], uses: Uses, seams: Iterable[Seam], known: Known
) -> Iterator[Problem]:
    """Yield everything that has to be checked before this version is said to work."""
    yield from _places(tree, known)
    yield from _uses(tree, uses.names, known)
    yield from _overrides(tree, uses.overrides, known)
    yield from (p for seam in seams if seam.is_meant_for(version) for p in _seam(tree, seam))
    yield from _routes(tree, known)
    yield from _undecided(tree, known)


def _undecided(tree: Tree, known: Known) -> Iterator[Problem]:
    """Yield what could be a way to run code that was never allowed."""
    for setting in settings_in(tree):
        if not setting.is_closed and not known.is_decided(setting.name):
            yield Problem(str(setting), "is new, and may name code; decide in code_settings")
    for place, call in imports_in(tree).items():
        if place not in known.imports:
            yield Problem(place, f"imports by name ({call}); add it to imports.txt")


def _places(tree: Tree, known: Known) -> Iterator[Problem]:
    for name, modules in known.places.items():
        is_there = any(tree.has(f"{module}.{name}") for module in modules.values())
        if not is_there and name not in known.optional:
            yield Problem(name, f"is in none of {', '.join(modules.values())}", "host.vllm_names")


def _uses(tree: Tree, uses: Iterable[Use], known: Known) -> Iterator[Problem]:
    for use in uses:
        names = [f"{m}.{use.name}" for m in known.places.get(use.name, {}).values()] or [use.name]
        found = next((name for name in names if tree.has(name)), None)
        if found is None:
            if use.name not in known.optional and use.name not in known.places:
                yield Problem(use.name, "does not exist", use.place)
        elif use.call is not None:
            is_given = tree.wants_its_object(found) and not use.call.is_bound
            call = replace(use.call, positional=use.call.positional - is_given)
            yield from _call(found, tree.signature(found), call, use.place)


def _call(name: str, signature: Signature | None, call: Call, place: str) -> Iterator[Problem]:
    if signature is None:
        return
    why = signature.refuses(call.positional, call.keywords, call.is_whole)
    if why is not None:
        yield Problem(f"{name}{signature}", why, place)


def _overrides(tree: Tree, overrides: Iterable[Override], known: Known) -> Iterator[Problem]:
    """Check that ours accept whatever vLLM's accept: vLLM calls them."""
    for override in overrides:
        theirs = tree.signature(override.name)
        if theirs is None or override.name in known.made_by_us:
            continue
        ours = Signature.of(override.node, is_method=True)
        named = theirs.keywords - set(theirs.positional)
        why = ours.refuses(len(theirs.positional), named, is_whole=False)
        if why is not None:
            yield Problem(f"{override.name}{theirs}", f"ours {why}", override.place)


def _seam(tree: Tree, seam: Seam) -> Iterator[Problem]:
    if seam.said_in:
        if not says(tree, seam.said_in, seam.names[0]):
            yield Problem(seam.said_in, f"does not mention {seam}", "declared")
        return
    found = next((name for name in seam.names if tree.has(name)), None)
    if found is None:
        yield Problem(str(seam), "does not exist", "declared")
    elif seam.positional is not None:
        call = Call(len(seam.positional), seam.keywords, is_whole=True)
        yield from _call(found, tree.signature(found), call, "declared")


def says(tree: Tree, module: str, name: str) -> bool:
    """Return whether a module's code has an attribute of this name, of whatever object."""
    found = tree.module(module)
    return found is not None and any(getattr(node, "attr", None) == name for node in found.walk())


def _routes(tree: Tree, known: Known) -> Iterator[Problem]:
    routes = routes_in(tree)
    for line in sorted(routes.keys() - known.routes):
        why = "is new; add it to VLLM_USER_ROUTES, VLLM_ADMIN_ROUTES or VLLM_REFUSED"
        yield Problem(line, why, routes[line])
    paths = {line.partition(" ")[2] for line in routes}
    known_names = handlers_in(tree)
    for path, names in known.handlers.items():
        if path in paths and not known_names.intersection(names):
            yield Problem(path, f"has no handler {' or '.join(names)}", "engines.frontend.HANDLERS")
    for name in sorted(known.state - known_names):
        yield Problem(f"app.state.{name}", "is never set", "engines.frontend")


def changed(old: Tree, new: Tree, names: Iterable[str]) -> Iterator[str]:
    """Yield those functions and classes that both versions have, with other code."""
    for name in sorted(set(names)):
        before, after = old.find(name), new.find(name)
        if before and after and before.source and before.source != after.source:
            yield name


def summary(found: Iterable[Any]) -> list[str]:
    """Return each problem once, in the order of its first appearance."""
    return list(dict.fromkeys(str(problem) for problem in found))
