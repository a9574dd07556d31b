"""`make check-vllm [VERSION=0.33.0]`: what another vLLM lacks of what this project uses.

Exits with 0 if nothing is missing, with 1 if something is, with 2 if the check fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.vllm_seams.declared import numbers, seams
from tools.vllm_seams.imports import decided
from tools.vllm_seams.report import Known, changed, problems, summary
from tools.vllm_seams.state import seams_of_state
from tools.vllm_seams.tree import Tree
from tools.vllm_seams.uses import Uses, uses_in
from tools.vllm_seams.wheel import NoSources, installed_sources, sources_of
from vllm_hotswap.api.vllm_routes import (
    OWN_IN_PLACE,
    VLLM_ADMIN_ROUTES,
    VLLM_REFUSED,
    VLLM_USER_ROUTES,
)
from vllm_hotswap.config.code_settings import is_decided
from vllm_hotswap.engines.frontend import HANDLERS
from vllm_hotswap.host.vllm_names import OPTIONAL, PLACES
from vllm_hotswap.host.vllm_versions import READ_ON, RUN_ON

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "vllm_hotswap"
MADE_BY_US = frozenset(["vllm.v1.engine.core.EngineCoreProc.__init__"])
READ_OF_STATE = frozenset(["openai_serving_models", "openai_serving_responses", "args"])


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        folder = args.sources or sources_of(args.version, args.cache)
    except NoSources as error:
        print(f"check-vllm: error: {error}", file=sys.stderr)
        return 2
    if not (folder / "vllm" / "__init__.py").is_file():
        print(f"check-vllm: error: there is no folder 'vllm' in {folder}", file=sys.stderr)
        return 2
    return _check(Tree(folder), args.version)


def known() -> Known:
    """Return what the product has decided."""
    return Known(
        places=PLACES,
        optional=OPTIONAL,
        routes=frozenset([*VLLM_USER_ROUTES, *VLLM_ADMIN_ROUTES, *VLLM_REFUSED, *OWN_IN_PLACE]),
        handlers=HANDLERS,
        state=READ_OF_STATE,
        made_by_us=MADE_BY_US,
        is_decided=is_decided,
        imports=frozenset(decided()),
    )


def _check(tree: Tree, version: str) -> int:
    uses, declared = uses_in(SOURCE, PLACES), (*seams(), *seams_of_state())
    found = summary(problems(tree, numbers(version), uses, declared, known()))
    for line in found:
        print(line)
    _tell_changes(tree, version, uses)
    print(
        f"check-vllm: vllm {version}: {len(uses.names)} uses, {len(uses.overrides)} overridden "
        f"methods, {len(declared)} declared names: "
        + (f"{len(found)} problems" if found else "no problems")
    )
    return 1 if found else 0


def _tell_changes(tree: Tree, version: str, uses: Uses) -> None:
    """Print names whose code differs from the version that the tests run on."""
    base = RUN_ON[-1]
    if version == base or (folder := installed_sources(base)) is None:
        return
    names = [use.name for use in uses.names] + [override.name for override in uses.overrides]
    names += [name for seam in seams() if not seam.said_in for name in seam.names]
    for name in changed(Tree(folder), tree, names):
        print(f"read this, its code differs from {base}: {name}")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check-vllm", description=__doc__)
    newest = max((*RUN_ON, *READ_ON), key=numbers)
    parser.add_argument("version", nargs="?", default=newest, help="(default: %(default)s)")
    parser.add_argument("--sources", type=Path, help="folder with a folder `vllm` in it")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "vllm-sources", help="folder of downloads"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
