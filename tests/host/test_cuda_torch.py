"""Memory of models under torch's own pools. Needs a CUDA device, or a stand-in for its driver.

A stand-in shows memory, not numbers: no kernels run here except copies.
"""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.rehearsal_results import record
from vllm_hotswap.errors import NoRoom
from vllm_hotswap.host.cuda_driver import Driver
from vllm_hotswap.host.cuda_memory import ModelMemory
from vllm_hotswap.host.cuda_pools import ModelPools, TorchCuda
from vllm_hotswap.host.devices import CudaDevice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

MIB = 1 << 20
BYTES: Any = {"dtype": torch.uint8, "device": "cuda"}


CHUNK = 4 * MIB
"""So small that most allocations here have several."""


def used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


@pytest.fixture(autouse=True)
def everything_is_given_back() -> Iterator[None]:
    """Each test releases everything, to the byte."""
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    before = used()
    yield
    gc.collect()
    torch.cuda.empty_cache()
    assert before == used()


class Model:
    """Weights, KV memory, and another tensor in the pool of the KV memory, as in vLLM 0.26."""

    def __init__(self, seed: int, kv_mib: int = 40, while_loading_mib: int = 64) -> None:
        self.seed, self.written = seed, 9
        self.pools = ModelPools(ModelMemory(Driver(torch.cuda.current_device()), CHUNK))
        with self.pools.allocating("weights"):
            self.weights = [torch.empty(n * MIB, **BYTES) for n in (1, 3, 9)]
            for number, weight in enumerate(self.weights):
                weight.copy_(self._weight(number))
            for_a_while = torch.empty(while_loading_mib * MIB, **BYTES)
            del for_a_while
        with self.pools.allocating("kv_cache"):
            self.kv = torch.empty(kv_mib * MIB, **BYTES)
            self.state = torch.empty(100, **BYTES)
        self.state.copy_(torch.arange(100, dtype=torch.uint8) + seed)
        self.write(9)

    def _weight(self, number: int) -> torch.Tensor:
        return torch.full(self.weights[number].shape, self.seed * 16 + number, dtype=torch.uint8)

    @property
    def memory(self) -> ModelMemory:
        return self.pools.memory

    def write(self, value: int) -> None:
        self.kv.copy_(torch.full(self.kv.shape, value, dtype=torch.uint8))
        self.written = value

    def sleep(self) -> None:
        kv = self.kv.untyped_storage()
        self.memory.sleep(
            [(kv.data_ptr(), kv.nbytes())], [(w.data_ptr(), w.numel()) for w in self.weights]
        )
        self.written = 0

    def check(self) -> None:
        for number, weight in enumerate(self.weights):
            assert torch.equal(weight.cpu(), self._weight(number))
        assert torch.equal(self.state.cpu(), torch.arange(100, dtype=torch.uint8) + self.seed)
        assert bool((self.kv.cpu() == self.written).all())

    def unload(self) -> None:
        pools = self.pools
        vars(self).clear()
        pools.close()


def test_models_sleep_and_wake_at_their_addresses() -> None:
    """Repeated sleeps and wakes do not grow; scratch memory of the load is gone."""
    base = used()
    one, two = Model(1), Model(2)
    both, where = used(), [weight.data_ptr() for weight in one.weights]
    assert both - base == one.memory.device_bytes + two.memory.device_bytes < 200 * MIB

    for _ in range(5):
        one.sleep()
        two.check()
        two.sleep()
        assert base == used()
        two.memory.wake()
        one.memory.wake()
        one.check()
        two.check()

    assert both == used()
    assert where == [weight.data_ptr() for weight in one.weights]
    one.sleep()
    one.unload()
    two.check()
    two.unload()


def test_a_model_wakes_in_slices_while_another_one_works() -> None:
    """Each slice is bounded; after a cancelled wake it holds nothing, and a new wake completes."""
    base = used()
    one, two = Model(1), Model(2)
    both = used()
    one.sleep()
    asleep = used()
    one.memory.wake_some(3 * CHUNK)
    assert asleep < used() <= asleep + 3 * CHUNK
    while one.memory.give_up_wake(CHUNK):
        two.write(7)
    assert asleep == used()

    slices = 0
    while not one.memory.progress.is_done:
        before = used()
        one.memory.wake_some(3 * CHUNK)
        assert used() - before <= 3 * CHUNK
        two.write(slices)
        slices += 1

    assert slices > 3
    one.memory.wake()
    assert both == used()
    one.check()
    two.check()
    one.unload()
    two.unload()
    assert base == used()


def test_a_wake_without_room_leaves_the_others_whole() -> None:
    """A wake without room leaves other models whole, and succeeds once there is room."""
    one, two = Model(1), Model(2)
    one.sleep()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - 8 * MIB, **BYTES)

    with pytest.raises(NoRoom, match="it is still asleep"):
        one.memory.wake()
    two.check()

    del hog
    torch.cuda.empty_cache()
    one.memory.wake()
    one.check()
    one.unload()
    two.unload()


def test_a_load_that_does_not_fit_leaves_nothing() -> None:
    """A load without room raises torch's error and leaves nothing; the next load succeeds."""
    pools = ModelPools(ModelMemory(Driver(0)))
    step = torch.cuda.mem_get_info()[1] // 4
    tensors = []
    with pytest.raises(torch.OutOfMemoryError), pools.allocating("weights"):
        tensors += [torch.empty(step, **BYTES) for _ in range(8)]
    tensors.clear()
    gc.collect()
    pools.close()

    model = Model(3)
    model.check()
    model.unload()


def test_torch_is_not_asked_for_one_pool() -> None:
    """A query for one pool would release a foreign reference: a crash after about 128 loads."""
    number = int("100000")
    pool = SimpleNamespace(id=(0, number), snapshot=lambda: torch.cuda.memory_snapshot((0, number)))
    before = sys.getrefcount(number)

    assert [] == TorchCuda().unused(pool)

    assert before == sys.getrefcount(number)


def test_tensors_that_outlive_their_pools_take_their_memory_with_them() -> None:
    """The memory goes with the last tensor, of a failed load or one that is still in use."""
    failed = Model(4)
    left = failed.weights
    failed.pools = None  # type: ignore[assignment]
    del failed
    gc.collect()
    del left

    model = Model(5)
    kept = model.weights[0]
    model.unload()
    assert bool((kept.cpu() == 5 * 16).all())


OPERATIONS = {"load": 2, "sleep": 3, "wake": 3, "write": 3, "unload": 1}
"""Operations with their relative frequencies."""


@pytest.mark.timeout(900)
def test_every_byte_is_accounted_for_in_any_order() -> None:
    """Every byte is accounted for in a thousand loads, sleeps, wakes, steps and unloads."""
    chance, base = random.Random(5), used()  # noqa: S311
    models: dict[int, Model] = {}
    done: Counter[str] = Counter()
    most = 0
    while done.total() < 1000:
        number = chance.randrange(4)
        model = models.get(number)
        (action,) = chance.choices([*OPERATIONS], [*OPERATIONS.values()])
        match action:
            case "load" if model is None:
                models[number] = Model(number + 1, 2 * (number + 1), while_loading_mib=20)
            case "sleep" if model is not None and not model.memory.is_asleep:
                model.sleep()
            case "wake" if model is not None and model.memory.is_asleep:
                model.memory.wake()
                model.check()
            case "write" if model is not None and not model.memory.is_asleep:
                model.write(chance.randrange(1, 255))
            case "unload" if model is not None:
                models.pop(number).unload()
            case _:
                continue
        done[action] += 1
        held = sum(each.memory.device_bytes for each in models.values())
        assert used() - base == held
        most = max(most, held)
    for model in models.values():
        if not model.memory.is_asleep:
            model.check()
        model.unload()
    record("operations in any order", **done, most_bytes=most, left_bytes=used() - base)


def test_held_bytes_are_what_the_device_says() -> None:
    """A sleeping model holds nothing, and torch keeps nothing."""
    device = CudaDevice()
    before = device.held_bytes()
    model = Model(6)
    cached = torch.empty(100 * MIB, **BYTES)
    del cached

    assert before + model.memory.device_bytes == device.held_bytes()
    model.sleep()
    assert before == device.held_bytes()
    model.unload()


# --- workspaces of matrix multiplications --------------------------------------------------------


class Graph:
    """Captured like vLLM's: warmed up on the stream of the capture, and then captured."""

    def __init__(self, stream: Any) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.weight = torch.empty(256, 256, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self.weight @ self.weight
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, pool=self.pool, stream=stream):
            self.output = self.weight @ self.weight
        torch.cuda.empty_cache()
        self.segments = addresses()
        """Segments that exist once it has been captured."""


def addresses(pool: Any = None) -> set[int]:
    """Return the addresses of torch's segments, of one pool or of all."""
    return {
        segment["address"]
        for segment in torch.cuda.memory_snapshot()
        if pool in (None, segment["segment_pool_id"])
    }


def forget_workspaces() -> None:
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@pytest.fixture
def no_workspaces() -> Iterator[None]:
    TorchCuda().clear_before_captures()
    forget_workspaces()
    yield
    forget_workspaces()


@pytest.mark.usefixtures("no_workspaces")
def test_nothing_vanishes_that_a_graph_may_know() -> None:
    """A graph's workspace is in the graph's own memory, and stays there whatever is cleared."""
    graph = Graph(torch.cuda.Stream())

    forget_workspaces()

    assert set() == graph.segments - addresses()


@pytest.mark.usefixtures("no_workspaces")
def test_an_unload_takes_no_workspace_of_another_models_graphs() -> None:
    """Models may share a stream, as streams repeat; each workspace goes with its own model."""
    before, stream = used(), torch.cuda.Stream()
    one, first = Model(1), Graph(stream)
    two, second = Model(2), Graph(stream)
    its_own = addresses(first.pool) | set(one.memory._segments)

    del first
    one.unload()
    assert set() == second.segments - addresses() - its_own

    del second
    two.unload()
    assert before == used()


@pytest.mark.usefixtures("no_workspaces")
def test_a_workspace_that_a_load_has_made_does_not_sleep() -> None:
    """A workspace from a load stays awake: it would serve all models' steps on the stream."""
    pools = ModelPools(ModelMemory(Driver(torch.cuda.current_device())))
    with pools.allocating("weights"):
        weight = torch.empty(256, 256, device="cuda")
        weight @ weight

    assert pools.memory.device_bytes <= 2 * MIB
    del weight
    pools.close()


def test_what_is_kept_for_the_whole_process_does_not_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared tensors stay awake, although the first model makes them while it loads."""
    module: Any = ModuleType("vllm.of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    pools = ModelPools(ModelMemory(Driver(torch.cuda.current_device())))
    with pools.allocating("weights"):
        module.workspace = torch.full((4 * MIB,), 7, **BYTES)

    assert not pools.memory.has(module.workspace.data_ptr())
    assert 0 == pools.memory.device_bytes
    assert module.workspace.numel() == 4 * MIB
    del module.workspace
    pools.close()
