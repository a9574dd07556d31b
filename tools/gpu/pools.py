"""Phase `pools`: the memory of two models, with CUDA graphs over it, taken away and given back."""

from __future__ import annotations

import gc
import time
from typing import Any

from benchmarks.stats import median
from tools.gpu.device import MIB
from tools.gpu.hog import pieces
from tools.gpu.results import Say
from tools.gpu.task import Task
from vllm_hotswap.errors import NoRoom
from vllm_hotswap.host.cuda_driver import Driver
from vllm_hotswap.host.cuda_memory import ModelMemory
from vllm_hotswap.host.cuda_pools import ModelPools, TorchCuda

CYCLES = 20
FIRSTS = 2
"""The first sleep of each, which makes a stream and the copy in host memory."""
WIDTH, LAYERS, KV_MIB = 1024, 40, 512
SMALL_LAYERS, SMALL_KV_MIB = 4, 32
HOG_LEAVES = 8 * MIB
NEAR = 4 * MIB
"""The device counts what the driver and the display take, too, and not in the driver's steps."""


class Model:
    """Weights and KV memory in pools of our own, and a graph that uses both."""

    def __init__(self, seed: int, layers: int, kv_mib: int) -> None:
        import torch

        numbers = torch.Generator().manual_seed(seed)
        made = [torch.randn(WIDTH, WIDTH, generator=numbers) / WIDTH**0.5 for _ in range(layers)]
        self.wanted = made
        self.pools = ModelPools(ModelMemory(Driver(torch.cuda.current_device())))
        with self.pools.allocating("weights"):
            self.weights = [weight.to("cuda") for weight in made]
            for_a_while = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
            del for_a_while
        with self.pools.allocating("kv_cache"):
            self.kv = torch.empty(kv_mib * MIB, dtype=torch.uint8, device="cuda")
            self.state = torch.arange(100, dtype=torch.int32).to("cuda")
        self.kv.fill_(1)
        self.input = torch.ones(8, WIDTH, device="cuda")
        self._capture()

    def _capture(self) -> None:
        import torch

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):
            self.output = self._step()
        self.graph.replay()
        torch.cuda.synchronize()
        self.answer = self.output.cpu()

    def _step(self) -> Any:
        value = self.input
        for weight in self.weights:
            value = value @ weight
        return value + self.kv[0] + self.state[1]

    @property
    def memory(self) -> ModelMemory:
        return self.pools.memory

    def sleep(self) -> float:
        """Put to sleep; return seconds."""
        kv = self.kv.untyped_storage()
        before_s = time.perf_counter()
        self.memory.sleep(
            [(kv.data_ptr(), kv.nbytes())], [(w.data_ptr(), w.nbytes) for w in self.weights]
        )
        return time.perf_counter() - before_s

    def wake(self) -> float:
        """Wake; return seconds."""
        before_s = time.perf_counter()
        self.memory.wake()
        return time.perf_counter() - before_s

    def is_whole(self) -> bool:
        """Return whether weights are as they were, and KV memory is zero, after a wake."""
        import torch

        weights = all(
            torch.equal(w.cpu(), wanted)
            for w, wanted in zip(self.weights, self.wanted, strict=True)
        )
        state = torch.equal(self.state.cpu(), torch.arange(100, dtype=torch.int32))
        return weights and state and not bool(self.kv.cpu().any())

    def answers(self) -> bool:
        """Return whether its graph gives what it gave before it slept."""
        import torch

        self.kv.fill_(1)
        self.output.fill_(0)
        self.graph.replay()
        torch.cuda.synchronize()
        return bool(torch.equal(self.output.cpu(), self.answer))

    def unload(self) -> None:
        pools = self.pools
        vars(self).clear()
        gc.collect()
        pools.close()


def used() -> int:
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def run(task: Task, say: Say) -> None:
    import torch

    TorchCuda().clear_before_captures()
    layers, kv_mib = (SMALL_LAYERS, SMALL_KV_MIB) if task.is_rehearsal else (LAYERS, KV_MIB)
    _warm_up()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    base = used()
    models = [Model(1, layers, kv_mib), Model(2, layers, kv_mib)]
    say.fact("held", "a model's memory", models[0].memory.device_bytes // MIB, "MiB")
    _cycles(say, models)
    _refused(say, models[0])
    models[1].sleep()
    while models:
        models.pop().unload()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    left = used() - base
    say.check(
        "unloaded", "left on the device after unloading both", left <= NEAR, left / MIB, "MiB"
    )


def _warm_up() -> None:
    """Load kernels and libraries, which happens on their first use and stays."""
    model = Model(0, 1, 1)
    model.sleep()
    model.wake()
    model.answers()
    model.unload()


def _cycles(say: Say, models: list[Model]) -> None:
    down: list[float] = []
    up: list[float] = []
    firsts: list[float] = []
    off, is_whole, is_equal, first = 0, True, True, 0
    for number in range(CYCLES):
        model, awake = models[number % 2], used()
        held = model.memory.device_bytes
        if number == FIRSTS:
            first = awake
        (firsts if number < FIRSTS else down).append(1000 * model.sleep())
        if number >= FIRSTS:
            off = max(off, abs(awake - used() - held))
        up.append(1000 * model.wake())
        is_whole &= model.is_whole()
        is_equal &= model.answers()
    say.fact("first_sleep", "the first sleep, with pinning and copying", firsts, "ms")
    say.fact("sleep", "later sleeps", down, "ms")
    say.fact("wake", "wakes", up, "ms")
    speed = models[0].memory.host_bytes / 1e6 / median(up)
    say.fact("wake_speed", "wake, by bytes of weights", speed, "GB/s")
    what = f"{CYCLES} sleeps gave back what the model held, except"
    say.check("given", what, off <= NEAR, off / MIB, "MiB")
    say.check("whole", f"contents after {CYCLES} wakes are the same, KV memory zero", is_whole)
    say.check(
        "graphs", f"graphs after {CYCLES} wakes give the same results", is_equal, by_kernels=True
    )
    grown = used() - first
    say.check("growth", "growth over these", grown <= NEAR, grown / MIB, "MiB")


def _refused(say: Say, model: Model) -> None:
    """Check that a wake without room is refused, and works once there is some."""
    import torch

    model.sleep()
    driver = Driver(torch.cuda.current_device())
    hogged = pieces(driver, HOG_LEAVES)
    try:
        model.memory.wake()
        is_refused = False
    except NoRoom:
        is_refused = model.memory.device_bytes == 0
    finally:
        for handle, _ in hogged:
            driver.release(handle)
    say.check("no_room", "a wake without room is refused, and leaves nothing", is_refused)
    if is_refused:
        model.wake()
    say.check("later", "it wakes later, with the same contents", model.is_whole())
