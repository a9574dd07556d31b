"""One complete vLLM engine inside the engine host.

`HostedEngine` is vLLM's `EngineCoreProc` without its process: no handshake socket, no signal
handlers, no busy loop of its own. `host.loop.EngineLoop` steps it.

Relies on, in vLLM 0.32.0: `EngineCoreProc.__init__` with `_perform_handshakes` overridable;
`_process_input_queue` not blocking when `process_input_queue_block` is false;
`_process_engine_step`; `has_work`; `_send_engine_dead`; the two IO threads it starts.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.utils import EngineZmqAddresses

from vllm_hotswap.host.messages import SocketPaths
from vllm_hotswap.host.threads import use_all_cores


class RingingQueue(queue.Queue[Any]):
    """A queue that rings a bell after every put, so that one thread can wait for many queues."""

    def __init__(self, ring: Callable[[], None]) -> None:
        super().__init__()
        self._ring = ring

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        self._ring()


class HostedEngine(EngineCoreProc):  # type: ignore[misc]  # vLLM's types stop here
    """An engine whose client lives in the API process and whose stepping the host decides."""

    def __init__(
        self,
        vllm_config: Any,
        executor_class: type[Any],
        log_stats: bool,
        sockets: SocketPaths,
        ring: Callable[[], None],
    ) -> None:
        self._sockets = sockets
        self._ring = ring
        super().__init__(
            vllm_config=vllm_config,
            local_client=True,
            handshake_address="",
            executor_class=executor_class,
            log_stats=log_stats,
        )
        self.process_input_queue_block = False

    @contextmanager
    def _perform_handshakes(self, *_: Any, **__: Any) -> Iterator[EngineZmqAddresses]:
        # vLLM's constructor calls this between making its queues and starting its IO threads.
        self.input_queue = RingingQueue(self._ring)
        yield EngineZmqAddresses(inputs=[self._sockets.input], outputs=[self._sockets.output])

    def process_input_sockets(self, *args: Any, **kwargs: Any) -> None:
        use_all_cores()
        super().process_input_sockets(*args, **kwargs)

    def process_output_sockets(self, *args: Any, **kwargs: Any) -> None:
        use_all_cores()
        super().process_output_sockets(*args, **kwargs)

    def has_input(self) -> bool:
        return not self.input_queue.empty()

    def take_input(self) -> None:
        self._process_input_queue()

    def run_step(self) -> None:
        self._process_engine_step()

    def die(self) -> None:
        self._send_engine_dead()

    def kv_bytes(self) -> int:
        """Bytes of KV memory; 0 for a model without any, where vLLM leaves its -1."""
        return max(0, int(self.available_gpu_memory_for_kv_cache))
