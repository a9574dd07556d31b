"""Watch what a process holds while something is done to it."""

from __future__ import annotations

import threading

from vllm_hotswap.host.devices import anonymous_bytes


class MemoryWatch:
    """The most memory that the engine host has held while it was watched."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self.most_bytes = 0

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.most_bytes = max(self.most_bytes, anonymous_bytes(self._pid))
