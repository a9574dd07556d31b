"""A GPU worker that shares its process with others: the differences to vLLM's own."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.cuda import STEP, FakeCuda, read, write
from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.host import cuda_hosting, cuda_memory, cuda_pools, together
from vllm_hotswap.host.cuda_driver import Driver, DriverError
from vllm_hotswap.host.cuda_hosting import HostedOnCuda
from vllm_hotswap.host.cuda_memory import ModelMemory
from vllm_hotswap.host.cuda_pools import ALLOCATE, FREE, ModelPools
from vllm_hotswap.host.teardown import pools_of
from vllm_hotswap.states import WakeProgress


class Storage:
    """Memory of a tensor, from a pool."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.size = address, nbytes

    def data_ptr(self) -> int:
        return self.address

    def nbytes(self) -> int:
        return self.size


class Tensor:
    """A tensor of the fake torch, alone in its segment."""

    def __init__(self, pool: FakePool | None, nbytes: int) -> None:
        self.pool = pool
        self.storage = Storage(pool.take(nbytes) if pool else 0, nbytes)

    def untyped_storage(self) -> Storage:
        return self.storage


class FakePool:
    """Calls the two functions as torch does, by their addresses."""

    def __init__(self, allocate: int, free: int) -> None:
        self._allocate, self._free = ALLOCATE(allocate), FREE(free)
        self.used: dict[int, int] = {}
        self.spare: dict[int, int] = {}

    def take(self, nbytes: int) -> int:
        address = self._allocate(nbytes, 0, None)
        if not address:
            raise MemoryError("CUDA out of memory")
        self.used[address] = nbytes
        return int(address)

    def let_go(self, tensor: Tensor) -> None:
        """Drop the tensor; torch keeps its memory."""
        address = tensor.storage.address
        self.spare[address] = self.used.pop(address)

    def give_back(self) -> None:
        for address, nbytes in [*self.spare.items()]:
            self._free(address, nbytes, 0, None)
        self.spare.clear()


class FakeTorch:
    """The part of torch that is used here. `told` are the calls without a result."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.moved: list[Any] = []
        self.pools: list[FakePool] = []
        self.current: FakePool | None = None
        self.on_empty_cache = lambda: None
        self.collects_garbage: list[bool] = []

    def allocator(self, allocate: int, free: int) -> Any:
        return allocate, free

    def pool(self, allocator: Any) -> FakePool:
        pool = FakePool(*allocator)
        self.pools.append(pool)
        return pool

    @contextmanager
    def using(self, pool: FakePool) -> Iterator[None]:
        before, self.current = self.current, pool
        self.collects_garbage.append(gc.isenabled())
        try:
            yield
        finally:
            self.current = before

    def unused(self, pool: FakePool) -> list[int]:
        return list(pool.spare)

    def synchronize(self) -> None:
        self.told.append("synchronize")

    def empty_cache(self) -> None:
        self.told.append("empty_cache")
        self.on_empty_cache()

    def clear_workspaces(self) -> None:
        self.told.append("clear_workspaces")

    def move_out(self, is_inside: Any) -> list[str]:
        self.moved.append(is_inside)
        return []

    def clear_before_captures(self) -> None:
        self.told.append("clear_before_captures")

    def tensor(self, nbytes: int) -> Tensor:
        return Tensor(self.current, nbytes)

    def forget(self, *tensors: Tensor) -> None:
        """Drop all references to these tensors; torch releases what is free."""
        for tensor in tensors:
            assert tensor.pool is not None
            tensor.pool.let_go(tensor)
        for pool in self.pools:
            pool.give_back()


class Worker:
    """The part of vLLM's worker that matters: its allocations, and their order."""

    asks_for = ("weights", "runtime", "kv_cache", "workspace")

    def __init__(self, torch: FakeTorch, kv_bytes: int | None = 4 * STEP) -> None:
        self.torch = torch
        self.cache_config = SimpleNamespace(
            gpu_memory_utilization=0.92, kv_cache_memory_bytes=kv_bytes
        )
        self.lora_config: Any = None
        self.parallel_config = SimpleNamespace(enable_eplb=False)
        self.vllm_config = SimpleNamespace(weight_transfer_config=None)
        self.model_config = SimpleNamespace(model="one")
        self.demanded: list[float] = []
        self.reloads = 0
        self.fails = False
        self.tensors: dict[str, Tensor] = {}

    def init_device(self) -> None:
        self.demanded.append(self.cache_config.gpu_memory_utilization)
        if self.fails:
            raise ValueError("no such device")

    def load(self) -> None:
        """Do what an engine has done by the end of a load."""
        self.init_device()
        sizes = {"weights": 3 * STEP, "kv_cache": 4 * STEP}
        for tag in self.asks_for:
            with self._maybe_get_memory_pool_context(tag):
                self.tensors[tag] = self.torch.tensor(sizes.get(tag, 100))
        parameter = self.tensors["weights"]
        self.model_runner = SimpleNamespace(
            model=SimpleNamespace(parameters=lambda: iter([parameter, parameter])),
            kv_caches=[[self.tensors["kv_cache"]], None],
            cudagraph_manager=SimpleNamespace(graphs={1: "graph"}),
        )
        self.compile_or_warm_up_model()

    def _maybe_get_memory_pool_context(self, tag: str) -> Any:
        raise AssertionError("the allocator of the whole process")

    def compile_or_warm_up_model(self) -> float:
        self.torch.told.append("captures")
        return 1.5

    def shutdown(self) -> None:
        self.torch.told.append("shutdown")

    def reload_weights(self, path: str) -> str:
        self.reloads += 1
        return path

    def reset_weights(self) -> None:
        self.reloads += 1


class Hosted(HostedOnCuda, Worker):
    """Our worker, on the fake device."""

    def __init__(self, cuda: FakeCuda, kv_bytes: int | None = 4 * STEP) -> None:
        self._torch = FakeTorch()
        self.cuda = cuda
        Worker.__init__(self, self._torch, kv_bytes)

    def _make_memory(self) -> ModelMemory:
        return ModelMemory(Driver(0, self.cuda))


def loaded(cuda: FakeCuda | None = None) -> Hosted:
    worker = Hosted(cuda or FakeCuda())
    worker.load()
    return worker


# --- a load ------------------------------------------------------------------------------------


def test_a_second_model_does_not_need_most_of_the_device() -> None:
    """During a load the required share of free memory is lowered, so that a second model fits."""
    worker = loaded()

    assert [0.001] == worker.demanded
    assert 0.92 == worker.cache_config.gpu_memory_utilization


def test_the_demand_is_as_it_was_after_a_load_that_failed() -> None:
    """After a failed load the required share is as before: it is the model's configuration."""
    worker = Hosted(FakeCuda())
    worker.fails = True

    with pytest.raises(ValueError, match="no such device"):
        worker.load()

    assert 0.92 == worker.cache_config.gpu_memory_utilization
    assert worker.take_pools() is None


def test_kv_memory_is_never_measured() -> None:
    """KV memory is never measured: vLLM's way assumes a device of its own, and clears graphs."""
    with pytest.raises(HotswapError, match="set kv_cache_memory_bytes"):
        Hosted(FakeCuda(), kv_bytes=None).load()


@pytest.mark.parametrize("asks_for", [("weights", "kv_cache"), Worker.asks_for])
def test_weights_and_kv_memory_are_in_pools_of_their_own(asks_for: tuple[str, ...]) -> None:
    """Both have pools of their own, for vLLM 0.26 and 0.32; other memory stays with torch."""
    cuda = FakeCuda()
    worker = Hosted(cuda)
    worker.asks_for = asks_for  # type: ignore[misc]

    worker.load()

    assert 7 * STEP == cuda.used == worker.pools.memory.device_bytes
    assert {"weights", "kv_cache"} == {tag for tag in asks_for if worker.tensors[tag].pool}


def test_two_workers_have_memory_of_their_own() -> None:
    """While one worker sleeps, the other's memory stays."""
    cuda = FakeCuda()
    one, two = loaded(cuda), loaded(cuda)
    write(two.tensors["kv_cache"].storage.address, b"two")

    one.sleep()

    assert 7 * STEP == cuda.used
    assert b"two" == read(two.tensors["kv_cache"].storage.address, 3)


def test_workspaces_of_matrix_multiplications_are_cleared_before_captures_and_not_after() -> None:
    """Workspaces are cleared before captures only: graphs know theirs (see `test_cuda_torch`)."""
    worker = loaded()
    torch: FakeTorch = worker._torch  # type: ignore[assignment]

    assert "clear_before_captures" == torch.told[0]
    assert "captures" == torch.told[-1]
    unload(worker)
    told = torch.told[torch.told.index("captures") :]
    assert ["synchronize", "clear_workspaces", "empty_cache"] == told[1:4]


def test_memory_that_a_load_has_used_for_a_while_is_given_back() -> None:
    """Scratch memory of a load is released, although torch keeps it in a pool for good."""
    cuda = FakeCuda()
    torch = FakeTorch()
    pools = ModelPools(ModelMemory(Driver(0, cuda)), torch)
    with pools.allocating("weights"):
        for_a_while = torch.tensor(20 * STEP)
        stays = torch.tensor(STEP)
        for_a_while.pool.let_go(for_a_while)  # type: ignore[union-attr]

    assert STEP == cuda.used
    torch.forget(stays)
    pools.close()
    assert {} == cuda.left


def test_tensors_in_what_vllm_has_frozen_are_found(caplog: pytest.LogCaptureFixture) -> None:
    """Tensors are found in objects that refer to each other and that no collection visits."""
    cuda = FakeCuda()
    torch = FakeTorch()
    pools = ModelPools(ModelMemory(Driver(0, cuda)), torch)
    with pools.allocating("weights"):
        tensor = torch.tensor(STEP)

    class Adapter:
        itself: object

    adapter = Adapter()
    adapter.itself = adapter
    weakref.finalize(adapter, torch.forget, tensor)
    gc.collect()
    del adapter, tensor
    gc.freeze()
    try:
        pools.close()
    finally:
        gc.unfreeze()

    assert {} == cuda.left
    assert "tensors_left" not in caplog.text


def test_a_worker_may_do_without_memory_of_its_own() -> None:
    """A worker without own memory does not sleep; it needs as little room, and leaves nothing."""
    worker = Hosted(cuda := FakeCuda())
    worker.has_pools = False
    worker.load()

    assert [0.001] == worker.demanded
    assert not any(tensor.pool for tensor in worker.tensors.values())
    assert [] == cuda.calls
    with pytest.raises(NotImplementedError, match="VLLM_HOTSWAP_CUDA_SLEEP is 0"):
        worker.sleep()
    assert "there" == worker.reload_weights("there")

    torch: FakeTorch = worker._torch  # type: ignore[assignment]
    pools = worker.take_pools()
    assert pools is not None
    pools.close()
    assert ["synchronize", "clear_workspaces", "empty_cache"] == torch.told[-3:]


def test_no_garbage_is_collected_while_torch_may_call_back() -> None:
    """A collecting thread would wait for torch's lock, and torch would wait for the GIL."""
    torch = FakeTorch()
    pools = ModelPools(ModelMemory(Driver(0, FakeCuda())), torch)
    assert gc.isenabled()

    with contextlib.suppress(KeyError), pools.allocating("weights"):
        raise KeyError

    assert [False] == torch.collects_garbage
    assert gc.isenabled()


def test_a_load_that_does_not_fit_fails_as_torch_has_it(caplog: pytest.LogCaptureFixture) -> None:
    """A load without room fails with torch's own error; the callback has logged the reason."""
    caplog.set_level(logging.INFO, "vllm_hotswap.host")
    cuda = FakeCuda(total=5 * STEP)

    with pytest.raises(MemoryError, match="CUDA out of memory"):
        loaded(cuda)

    assert "event=allocation_failed" in caplog.text
    assert 3 * STEP == cuda.used  # the weights, which go with their tensors


# --- sleep and wake ------------------------------------------------------------------------------


def test_a_worker_sleeps_and_wakes() -> None:
    """After a wake weights are as they were, and KV memory is zero."""
    worker = loaded(cuda := FakeCuda())
    weights, kv = (worker.tensors[tag].storage.address for tag in ("weights", "kv_cache"))
    write(weights, b"weights"), write(kv, b"kv")
    assert (7 * STEP, 3 * STEP) == worker.sleep_bytes()

    worker.sleep()
    assert 0 == cuda.used
    worker.wake_up()

    assert (b"weights", bytes(4 * STEP)) == (read(weights, 7), read(kv, 4 * STEP))
    assert 3 * STEP == worker.pools.memory.host_bytes


def test_there_is_no_second_level() -> None:
    """A sleep at level 2 is refused, and nothing is done."""
    worker = loaded(cuda := FakeCuda())

    with pytest.raises(NotImplementedError, match="sleep level 2"):
        worker.sleep(2)

    assert not worker.supports_discard()
    assert 7 * STEP == cuda.used


@pytest.mark.parametrize(
    ("change", "times"),
    [
        (lambda worker: None, 1),
        (lambda worker: worker.reload_weights("there"), 2),
        (lambda worker: worker.reset_weights(), 2),
        (lambda worker: setattr(worker, "lora_config", "adapters"), 2),
        (lambda worker: setattr(worker.parallel_config, "enable_eplb", True), 2),
        (lambda worker: setattr(worker.vllm_config, "weight_transfer_config", "trainer"), 2),
    ],
    ids=["nothing", "reload_weights", "reset_weights", "adapters", "experts", "a trainer"],
)
def test_weights_are_copied_again_where_something_may_have_written_to_them(
    change: Any, times: int
) -> None:
    """Weights that adapters, experts or a trainer may change are copied again, others once."""
    worker = loaded(cuda := FakeCuda())
    worker.sleep()
    worker.wake_up()
    change(worker)

    worker.sleep()

    assert times * 3 * STEP == cuda.copied


def test_a_wake_takes_what_torch_keeps_before_it_gives_up() -> None:
    """A wake without room first takes what torch keeps free after steps of other models."""
    cuda = FakeCuda(total=8 * STEP)
    worker = loaded(cuda)
    worker.sleep()
    cuda.others = 2 * STEP  # activations of another model
    torch: FakeTorch = worker._torch  # type: ignore[assignment]
    torch.on_empty_cache = lambda: setattr(cuda, "others", 0)

    worker.wake_up()

    assert 7 * STEP == cuda.used


def test_a_wake_without_room_says_so() -> None:
    """A wake without room reports it, and can be tried again."""
    cuda = FakeCuda(total=8 * STEP)
    worker = loaded(cuda)
    worker.sleep()
    cuda.others = 2 * STEP

    with pytest.raises(NoRoom, match="it is still asleep"):
        worker.wake_up()

    cuda.others = 0
    worker.wake_up()
    assert 7 * STEP == cuda.used


# --- several workers, all or none ----------------------------------------------------------------


class Ranks:
    """The workers of one model, called as vLLM does: an exception of one becomes text."""

    def __init__(self, *cudas: FakeCuda) -> None:
        self.cudas = cudas
        self.workers = [loaded(cuda) for cuda in cudas]

    def __call__(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        try:
            return [getattr(worker, method)(*args) for worker in self.workers]
        except DriverError as error:
            raise RuntimeError(f"Worker failed with error '{error}'") from None

    @property
    def held(self) -> list[int]:
        return [cuda.used - cuda.others for cuda in self.cudas]

    @property
    def copies(self) -> list[int]:
        return [worker.pools.memory.host_bytes for worker in self.workers]


def scarce_for(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deny host memory for the copies of one device."""
    made = cuda_memory.HostCopy

    def make(driver: Driver, nbytes: int) -> cuda_memory.HostCopy:
        if driver._cuda is cuda:
            raise OSError("Cannot allocate memory")
        return made(driver, nbytes)

    monkeypatch.setattr(cuda_memory, "HostCopy", make)


def test_all_workers_of_a_model_sleep_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker without host memory is found before another has released anything."""
    ranks = Ranks(FakeCuda(), FakeCuda())
    with monkeypatch.context() as patch:
        scarce_for(ranks.cudas[1], patch)
        with pytest.raises(NoRoom, match="no host memory"):
            together.get_ready_to_sleep(ranks)
    assert ([7 * STEP] * 2, [0, 0]) == (ranks.held, ranks.copies)

    together.get_ready_to_sleep(ranks)
    ranks("sleep")
    assert ([0, 0], [3 * STEP] * 2) == (ranks.held, ranks.copies)


def test_weights_are_copied_once_for_a_sleep_of_several_workers() -> None:
    """For several workers weights are copied once, even those that may change between sleeps."""
    ranks = Ranks(FakeCuda(), FakeCuda())
    for worker in ranks.workers:
        worker.lora_config = "adapters"
    for times in (1, 2):
        together.get_ready_to_sleep(ranks)
        ranks("sleep")
        assert [times * 3 * STEP] * 2 == [cuda.copied for cuda in ranks.cudas]
        ranks("wake_up")


def test_all_workers_of_a_model_wake_or_none() -> None:
    """If one lacks room, the others release what they have taken."""
    ranks = Ranks(FakeCuda(), FakeCuda(total=8 * STEP))
    ranks("sleep")
    ranks.cudas[1].others = 4 * STEP
    with pytest.raises(NoRoom, match="it is still asleep"):
        together.get_ready_to_wake(ranks)
    assert [0, 0] == ranks.held

    ranks.cudas[1].others = 0
    together.get_ready_to_wake(ranks)
    ranks("wake_up")
    assert [7 * STEP] * 2 == ranks.held


def test_all_workers_of_a_model_wake_in_slices_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers wake in slices with one progress; if one lacks room, none holds anything."""
    monkeypatch.setattr(cuda_hosting, "reserve_bytes", lambda total: total // 8)
    ranks = Ranks(FakeCuda(total=16 * STEP), FakeCuda(total=16 * STEP))
    ranks("sleep")

    assert WakeProgress(6 * STEP, 14 * STEP) == together.wake_some(ranks, 2 * STEP)
    assert [3 * STEP] * 2 == ranks.held
    ranks.cudas[0].others = 9 * STEP
    with pytest.raises(NoRoom, match=r"1.0 MiB are free, 0.1 MiB of them reserved for the active"):
        together.wake_some(ranks, 4 * STEP)
    assert [0, 0] == ranks.held

    together.wake_some(ranks, 3 * STEP)
    assert 0 == together.give_up_wake(ranks, 7 * STEP)
    assert [0, 0] == ranks.held


def test_want_of_room_is_told_although_it_cannot_be_undone() -> None:
    """The first lack of room is reported, whether a worker raised it or returned it."""

    def rpc(method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "give_up_wake":
            raise HotswapError("copies cannot be waited for")
        return [None, "no room: waking takes 7 MiB"]

    with pytest.raises(NoRoom, match="waking takes 7 MiB"):
        together.get_ready_to_wake(rpc)


def test_a_worker_that_fails_has_the_others_undo_what_they_did() -> None:
    """If a worker fails, the others undo their part, and the cause is reported in any case."""
    ranks = Ranks(FakeCuda(), FakeCuda())
    ranks("sleep")
    ranks.cudas[1].refuses = {"cuMemMap"}

    with pytest.raises(RuntimeError, match="Worker failed with error 'cuMemMap"):
        together.wake_some(ranks, 2 * STEP)

    assert [0, 0] == ranks.held


# --- the end -------------------------------------------------------------------------------------


def unload(worker: Hosted, *left: str) -> None:
    """Unload as `HostedEngine` does; `left` are tags whose tensors are still referenced."""
    torch: FakeTorch = worker._torch  # type: ignore[assignment]
    pools = pools_of(
        {"model_executor": SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))}
    )
    tensors = [worker.tensors[tag] for tag in {"weights", "kv_cache"} - set(left)]
    torch.on_empty_cache = lambda: torch.forget(*[tensors.pop() for _ in [*tensors]])
    pools.close()


@pytest.mark.parametrize("asleep", [False, True])
def test_an_unload_gives_everything_back(asleep: bool) -> None:
    """An unload releases everything, repeatedly, whether or not the model sleeps."""
    cuda = FakeCuda()
    known = set(cuda_pools._functions)
    for _ in range(12):
        worker = loaded(cuda)
        worker.sleep()
        if not asleep:
            worker.wake_up()
        unload(worker)

        assert {} == cuda.left
        assert {} == cuda.streams
        del worker
    gc.collect()
    assert len(set(cuda_pools._functions) - known) <= 1  # of the last load


def test_memory_of_a_tensor_that_somebody_has_kept_goes_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Memory of a referenced tensor stays until the tensor goes: its next use would crash."""
    cuda = FakeCuda()
    worker = loaded(cuda)
    unload(worker, "weights")

    assert "event=tensors_left" in caplog.text
    assert 3 * STEP == cuda.used
    torch: FakeTorch = worker._torch  # type: ignore[assignment]
    kept = worker.tensors["weights"]
    del worker
    gc.collect()
    torch.forget(kept)
    assert {} == cuda.left


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("call", ["cuMemUnmap", "cuMemRelease", "cuMemAddressFree"])
def test_what_an_unload_cannot_give_back_is_given_back_a_little_later(
    call: str, asleep: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """After one failed call in an unload, a later attempt releases everything."""
    for place in range(100):
        cuda = FakeCuda()
        worker = loaded(cuda)
        worker.sleep()
        if not asleep:
            worker.wake_up()
        cuda.fails_at_name = call, place
        unload(worker)
        if cuda.failed is None:
            break
        assert {} == cuda.left
        assert {} == cuda.streams
    assert place > 0 or (asleep and call != "cuMemAddressFree")
    assert "event=tensors_left" not in caplog.text


def test_what_torch_calls_lives_as_long_as_it_may_be_called() -> None:
    """Our functions live as long as torch may call them, even after a failed load's worker."""
    cuda = FakeCuda()
    worker = loaded(cuda)
    torch: FakeTorch = worker._torch  # type: ignore[assignment]
    tensors = [worker.tensors["weights"], worker.tensors["kv_cache"]]
    del worker
    gc.collect()

    torch.forget(*tensors)

    assert {} == cuda.left


def test_graphs_go_at_once() -> None:
    """Graphs go without a garbage collection; a worker that failed early has none."""
    worker = loaded()
    worker.release_graphs()
    assert {} == worker.model_runner.cudagraph_manager.graphs

    Hosted(FakeCuda()).release_graphs()


def test_graphs_of_parts_of_a_model_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs in wrappers, all of which vLLM knows, go at once, too."""
    cleared: list[str] = []
    for module, name in cuda_hosting.WRAPPERS:
        wrapper = SimpleNamespace(clear_all_graphs=lambda name=name: cleared.append(name))
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: wrapper}))

    loaded().release_graphs()

    assert ["CUDAGraphWrapper", "BreakableCUDAGraphWrapper"] == cleared


def test_the_end_of_a_worker_process_leaves_nothing_for_torch_to_call() -> None:
    """A worker process leaves no functions: its interpreter destroys them before torch's pools."""
    worker = loaded(cuda := FakeCuda())
    torch: FakeTorch = worker._torch  # type: ignore[assignment]
    in_pools = [tensor for tensor in worker.tensors.values() if tensor.pool]
    torch.on_empty_cache = lambda: torch.forget(*[in_pools.pop() for _ in [*in_pools]])
    pools = worker.pools

    worker.shutdown()
    worker.shutdown()

    assert [] == pools._pools
    assert {} == cuda.left
    assert 2 == torch.told.count("shutdown")


def test_what_is_kept_for_the_whole_process_lies_elsewhere() -> None:
    """Memory for the whole process is found after each allocation, and lies elsewhere."""
    worker = loaded()
    torch: FakeTorch = worker._torch  # type: ignore[assignment]
    inside = torch.moved[-1]

    assert 2 == len(torch.moved)
    weights = worker.tensors["weights"].storage
    assert inside(weights.address + weights.size - 1)
    assert not inside(weights.address + worker.pools.memory.device_bytes * 100)


def test_a_worker_of_another_kind_has_no_pools() -> None:
    """Workers of another kind have no pools, nor has an engine whose creation failed."""
    assert pools_of({}) is None
    assert pools_of({"model_executor": SimpleNamespace(driver_worker=None)}) is None
