"""What tests prepare for the operations of fake engines: gates that hold them, and failures."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection

from vllm_hotswap.errors import HotswapError


class Gates:
    """Operations that are held or will fail, by name and alias.

    The mutable state is `_gates` and `_failures`, changed by this class alone.
    """

    def __init__(self) -> None:
        self._gates: dict[tuple[str, str], asyncio.Event] = {}
        self._failures: dict[tuple[str, str], list[HotswapError]] = defaultdict(list)

    def __repr__(self) -> str:
        return f"<Gates held={list(self._gates)}>"

    def hold(self, operation: str, alias: str) -> None:
        self._gates[operation, alias] = asyncio.Event()

    def release(self, operation: str, alias: str) -> None:
        self._gates.pop((operation, alias)).set()

    def open_all(self, but: Collection[str]) -> None:
        """Let go on what is held, except operations named in `but`; gates stay in place."""
        for (operation, _), gate in self._gates.items():
            if operation not in but:
                gate.set()

    def fail_next(self, operation: str, alias: str, error: HotswapError | None) -> None:
        failure = error or HotswapError(f"{operation} of {alias!r} was made to fail")
        self._failures[operation, alias].append(failure)

    def forget_failures(self) -> None:
        """Let every operation succeed that was to fail."""
        self._failures.clear()

    async def wait(self, operation: str, alias: str) -> None:
        """Wait as long as the operation is held."""
        if gate := self._gates.get((operation, alias)):
            await gate.wait()

    def check(self, operation: str, alias: str) -> None:
        """Raise the failure that is prepared, once."""
        if failures := self._failures[operation, alias]:
            raise failures.pop(0)
