"""The process-wide state of vLLM that `host.vllm_state` lists, as far as sources show it.

A renamed global would silently not be moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tools.vllm_seams.declared import Seam, numbers
from vllm_hotswap.host.vllm_state import STATE, State

CLASSES = {"vllm.platforms.current_platform.__class__": "vllm.platforms.interface.Platform"}
"""Objects that exist only at run time, and their classes."""


def seams_of_state(states: Iterable[State] = STATE) -> Iterator[Seam]:
    """Yield the lookups for each place. For a pattern: what comes before it, and its last name."""
    for state in states:
        module, _, path = state.place.partition(":")
        if not module.startswith("vllm.") or "*" in module:
            continue
        whole, _, rest = path.partition(".*.")
        yield _seam(state, module if "*" in whole else f"{module}.{whole}")
        if rest:
            yield _seam(state, rest, said_in=module)


def _seam(state: State, name: str, said_in: str = "") -> Seam:
    for place, owner in CLASSES.items():
        name = name.replace(place, owner)
    return Seam((name,), None, (), numbers(state.since), (), said_in)
