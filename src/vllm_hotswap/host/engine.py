"""One complete vLLM engine inside the engine host.

`HostedEngine` is vLLM's `EngineCoreProc` without its process: no handshake socket, no signal
handlers, no busy loop of its own. `host.loop.EngineLoop` steps it.

It outlives its model: sockets, IO threads and the client in the API process stay when the model
is unloaded, and serve the next load of the same model. So a reload starts no process or
thread, and builds no frontend.

Relies on, in vLLM 0.32.0: `EngineCoreProc.__init__` with `_perform_handshakes` overridable;
`EngineCore.__init__` callable again on the same object; `_process_input_queue` not blocking when
`process_input_queue_block` is false; `_process_engine_step`; `has_work`; `_initialize_kv_caches`;
`pause_scheduler` with mode "keep"; `_reset_caches`; `set_weight_version`; `add_request`,
`abort_requests`, `add_lora` and `remove_lora`; the two IO threads it starts, which touch
`aborts_queue` and `input_queue` while no model is loaded.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.request import RequestStatus

from vllm_hotswap.errors import one_line
from vllm_hotswap.host import gaudi, grammars, together
from vllm_hotswap.host.canaries import Canaries
from vllm_hotswap.host.compiled import CompiledCode
from vllm_hotswap.host.cuda_memory import GIVE_UP_BYTES, SLICE_BYTES
from vllm_hotswap.host.devices import device_of
from vllm_hotswap.host.hashing import with_own_globals
from vllm_hotswap.host.messages import SocketPaths
from vllm_hotswap.host.randomness import Randomness
from vllm_hotswap.host.state import EngineState, in_own_state, process_state
from vllm_hotswap.host.teardown import dismantle, pools_of
from vllm_hotswap.host.threads import use_all_cores
from vllm_hotswap.states import WakeProgress
from vllm_hotswap.system import log_of_clients, value_text


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

    _lasting: frozenset[str] | None = None
    """Attributes that stay when the model goes; known once vLLM begins to make the model."""

    request_block_hasher: Any
    """vLLM's, with this engine's own root; None without a prefix cache."""

    state: EngineState | None = None
    """Of the model that is loaded, or is being loaded."""

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
        self._executor_class = executor_class
        self._code = CompiledCode()
        self._canaries = Canaries()
        self._randomness: Randomness | None = None
        with self._loading(vllm_config):
            super().__init__(
                vllm_config=vllm_config,
                local_client=True,
                handshake_address="",
                executor_class=executor_class,
                log_stats=log_stats,
            )
        self.process_input_queue_block = False

    @contextmanager
    def _loading(self, vllm_config: Any) -> Iterator[None]:
        """A load inside finds the state of a process of its own; one that fails leaves nothing."""
        process, drawn_before = process_state(), self._randomness
        self.state = state = process.begin(vllm_config)
        try:
            process.put_in_place(state)
            gaudi.prepare_load(vllm_config)
            yield
            self._bind_hashes()
            grammars.take_turns(self.structured_output_manager)
            process.loaded(state)
        except BaseException:
            self._forget_model()
            self._randomness = drawn_before
            raise
        if drawn_before is not None:  # as if the model had never been gone
            drawn_before.restore()

    def _bind_hashes(self) -> None:
        """Have the prefix cache begin at this engine's own root, also on the input thread.

        That thread hashes new requests at any time, when another engine's root may be in place.
        """
        if (hasher := self.request_block_hasher) is not None:
            self.request_block_hasher = with_own_globals(hasher)

    @contextmanager
    def _perform_handshakes(self, *_: Any, **__: Any) -> Iterator[EngineZmqAddresses]:
        # vLLM's constructor calls this between making its queues and starting its IO threads.
        self.input_queue = RingingQueue(self._ring)
        yield EngineZmqAddresses(inputs=[self._sockets.input], outputs=[self._sockets.output])

    def _init_data_parallel(self, vllm_config: Any) -> None:
        super()._init_data_parallel(vllm_config)
        # vLLM's constructor calls this just before it makes what belongs to the model.
        self._lasting = frozenset(
            [*vars(self), "_lasting", "enable_fault_tolerance", "output_thread"]
        )

    def _initialize_kv_caches(self, vllm_config: Any) -> Any:
        # vLLM calls this between reading the weights and its first run of the model.
        self._code.share_with(self.model_executor)
        self._tried_adapters: set[int] = set()
        return super()._initialize_kv_caches(vllm_config)

    def process_input_sockets(self, *args: Any, **kwargs: Any) -> None:
        use_all_cores()
        super().process_input_sockets(*args, **kwargs)

    def process_output_sockets(self, *args: Any, **kwargs: Any) -> None:
        use_all_cores()
        super().process_output_sockets(*args, **kwargs)

    # --- stepping ---------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        return hasattr(self, "model_executor")

    def has_input(self) -> bool:
        return not self.input_queue.empty()

    @in_own_state
    def take_input(self) -> None:
        if self.is_loaded:
            self._process_input_queue()
        else:
            self._turn_away_input()

    def has_work(self) -> bool:
        return self.is_loaded and not self._canaries.is_expected and super().has_work()

    def abort_requests(self, request_ids: list[str]) -> None:
        grammars.give_up(self.scheduler, request_ids)
        super().abort_requests(request_ids)

    @in_own_state
    def run_step(self) -> None:
        self._process_engine_step()
        self._canaries.after_step(self.scheduler)

    def expect_canary(self, is_expected: bool) -> None:
        """Step nothing before a canary, and nothing beside it; or wait for none any more."""
        self._canaries.expect(self.scheduler, is_expected)

    @in_own_state
    def die(self) -> None:
        # Its client is not told: it would never work again. Whoever waits there is told otherwise.
        if self.is_loaded:
            self._forget_model()

    def stamp_outputs(self, stamp: str) -> None:
        """Have every output from now on carry `stamp`, as its weight version."""
        if hasattr(self, "set_weight_version"):  # since vLLM 0.32
            self.set_weight_version(stamp)

    def _turn_away_input(self) -> None:
        """Answer calls with an error and forget aborts: there is no model."""
        while not self.input_queue.empty():
            kind, request = self.input_queue.get_nowait()
            if kind == EngineCoreRequestType.UTILITY:
                self._handle_client_request(kind, request)
            elif kind == EngineCoreRequestType.ADD:
                self._send_error_outputs_to_client([request[0].request_id], request[0].client_index)

    # --- adapters ---------------------------------------------------------------------------

    def add_request(self, request: Any, request_wave: int = 0) -> None:
        """Take a request in, unless its adapter cannot be loaded: that would end a step."""
        self._canaries.note_request(request)
        try:
            self._try_adapter(request.lora_request)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this request's alone
            log_of_clients.error(
                "event=adapter_failed adapter=%s cause=%r",
                value_text(request.lora_request.lora_name),
                one_line(error),
            )
            self._send_error_outputs_to_client([request.request_id], request.client_index)
        else:
            super().add_request(request, request_wave)

    def _try_adapter(self, adapter: Any | None) -> None:
        if adapter is None:
            return
        if adapter.lora_int_id not in self._tried_adapters:
            self._load_adapter(adapter)
        elif not Path(adapter.lora_path).is_dir():  # a step may have to read it once more
            raise FileNotFoundError("its folder is gone")

    @wraps(EngineCore.add_lora)  # vLLM reads the types of its parameters
    def add_lora(self, lora_request: Any) -> bool:
        return self._load_adapter(lora_request)

    def _load_adapter(self, adapter: Any) -> bool:
        """Load an adapter; one that cannot be loaded leaves nothing behind.

        vLLM would keep the half of it that it has copied, and take that for the whole next time.
        """
        try:
            added = bool(super().add_lora(adapter))
        except BaseException:
            with suppress(Exception):
                self.remove_lora(adapter.lora_int_id)
            raise
        self._tried_adapters.add(adapter.lora_int_id)
        return added

    # --- residency --------------------------------------------------------------------------

    @in_own_state
    def sleep(self, level: int = 1, mode: str = "keep") -> None:
        """Give memory back; running requests are recomputed after `wake`, none is lost.

        Args:
            level: 1 keeps the weights in host memory, 2 drops them.
            mode: kept for vLLM's signature; always "keep".
        """
        self.pause_scheduler(mode="keep", clear_cache=False)
        try:
            while self.has_work():  # steps that have been begun, in asynchronous scheduling
                self.run_step()
            self._notify_idle_state_callbacks()
            self._reset_caches()
            if self.model_executor.is_sleeping:  # vLLM goes no deeper from there
                self.model_executor.wake_up()
            self._have_all_sleep(level)
            grammars.forget_compiled(self.structured_output_manager)
        except BaseException:
            if not self.model_executor.is_sleeping:
                self.resume_scheduler()
            raise

    def _have_all_sleep(self, level: int) -> None:
        if not self._has_several_workers:
            self.model_executor.sleep(level)
            return
        if device_of(self.vllm_config).wakes_in_slices:
            together.get_ready_to_sleep(self.collective_rpc)
        try:
            self.model_executor.sleep(level)
        except Exception as error:
            cause = one_line(error)
            raise together.HalfAsleep(f"a worker could not fall asleep: {cause}") from error

    @property
    def _has_several_workers(self) -> bool:
        return bool(self.vllm_config.parallel_config.world_size > 1)

    @in_own_state
    def wake(self) -> None:
        """Take memory back and schedule again.

        Raises:
            NoRoom: there is too little; it is still asleep.
        """
        if self._has_several_workers and device_of(self.vllm_config).wakes_in_slices:
            together.get_ready_to_wake(self.collective_rpc)
        self.model_executor.wake_up()
        self.resume_scheduler()

    # Not in its own state: that costs the model that is stepped more than a slice, and memory is
    # all that is touched.

    def wake_some(self) -> WakeProgress:
        """Take a slice of the memory again; it is asleep until `wake`.

        Raises:
            NoRoom: there is too little; it has given back what it had taken.
        """
        return together.wake_some(self.collective_rpc, SLICE_BYTES)

    def give_up_wake(self) -> int:
        """Give back a part of what `wake_some` has taken; how many bytes are left."""
        return together.give_up_wake(self.collective_rpc, GIVE_UP_BYTES)

    @in_own_state
    def supports_discard(self) -> bool:
        """Whether sleep level 2 can be undone by `wake` for this model on this worker."""
        return all(self.collective_rpc("supports_discard"))

    @in_own_state
    def weights_bytes(self) -> int:
        """Bytes that sleep level 2 gives back besides KV memory."""
        return sum(self.collective_rpc("weights_bytes"))

    @in_own_state
    def sleep_bytes(self) -> tuple[int, int]:
        """What sleep level 1 gives back on the device of one worker, and what it takes of the
        host's memory for all of them; in bytes. For workers that can tell.
        """
        sizes = self.collective_rpc("sleep_bytes")
        return sizes[0][0], sum(host for _, host in sizes)

    @in_own_state
    def unload(self) -> None:
        """Give back everything of the model; the IO threads and sockets stay."""
        if self.is_loaded:
            aborted = self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
            self._send_abort_outputs(aborted)
            self.structured_output_manager.clear_backend()
            self.scheduler.shutdown()
            self._forget_model()

    def reload(self, vllm_config: Any, log_stats: bool) -> None:
        """Load the model again, behind the same sockets. If that fails, nothing of it is left."""

        def executor_failed() -> None:
            self.input_queue.put_nowait((EngineCoreRequestType.EXECUTOR_FAILED, b""))

        with self._loading(vllm_config):
            EngineCore.__init__(
                self, vllm_config, self._executor_class, log_stats, executor_failed, False
            )

    def _forget_model(self) -> None:
        """Drop every attribute that loading a model has set, and what hangs on it.

        Its memory goes last: the process-wide state of the model may have tensors in it.
        """
        with ExitStack() as last:
            try:
                if self._lasting is not None:
                    self._forget_attributes(self._lasting, last)
            finally:
                self._forget_state()

    def _forget_state(self) -> None:
        """Only the random numbers stay, for the next load."""
        if (state := self.state) is not None:
            try:
                self._randomness = process_state().end(state)
            finally:
                self.state = None

    def _forget_attributes(self, lasting: frozenset[str], last: ExitStack) -> None:
        self._canaries.forget()
        model = {name: value for name, value in vars(self).items() if name not in lasting}
        try:
            if executor := model.get("model_executor"):
                self._code.reclaim_from(executor)
                executor.shutdown()
        finally:
            # The input thread may put an abort at any time.
            self.aborts_queue = queue.Queue[list[str]]()
            for name in model:
                if name != "aborts_queue":
                    delattr(self, name)
            pools = pools_of(model)
            dismantle(model)
            model.clear()
            if pools is not None:
                last.callback(pools.close)

    def kv_bytes(self) -> int:
        """Bytes of KV memory; 0 for a model without any, where vLLM leaves its -1."""
        return max(0, int(self.available_gpu_memory_for_kv_cache))
