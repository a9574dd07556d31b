"""Phase `large`: models of the 8B class, or as large as fit, made here with random weights."""

from __future__ import annotations

import asyncio
import os
import shutil
import time

import psutil

from benchmarks.servers import Model
from tools.gpu import checkpoints
from tools.gpu.device import GIB, total_bytes
from tools.gpu.goals import BIG
from tools.gpu.results import Say
from tools.gpu.serving import GRAPHS, Counts, serve
from tools.gpu.sizes import REHEARSAL, Room, Sizes, choose
from tools.gpu.task import Task
from vllm_hotswap.host.cuda_driver import Driver, check_driver
from vllm_hotswap.host.nvml import device_free_bytes

MID = "mid"
COUNTS = Counts(parked=50, cycles=20, cold=4)
OF_A_REHEARSAL = Counts(parked=4, cycles=4, cold=2)
SEEDS = {BIG: 1, MID: 2}


class TooSmall(Exception):
    """There is too little room here; the message names what is short."""


def run(task: Task, say: Say) -> None:
    sizes = sizes_for(task)
    counts = OF_A_REHEARSAL if task.is_rehearsal else COUNTS
    models = made(task, say, sizes)
    for alias, nbytes in ((BIG, sizes.big_bytes), (MID, sizes.mid_bytes)):
        say.fact(f"weights_bytes.{alias}", f"{alias}: weights", nbytes, "bytes")
    say.fact("is_8b", f"{BIG} has the shape of an 8B model", sizes.is_8b)
    say.fact("kv", "KV memory of each", sizes.kv_bytes, "bytes")
    asyncio.run(serve(task, say, models, counts))


def sizes_for(task: Task) -> Sizes:
    """Return the sizes. Raises `TooSmall`."""
    if task.is_rehearsal:
        return REHEARSAL
    room = room_for(task)
    sizes = choose(room)
    if sizes is None:
        raise TooSmall(
            f"no model fits: {room.device / GIB:.1f} GiB of the device, {room.host / GIB:.1f} GiB "
            f"of host memory and {room.disk / GIB:.1f} GiB of {task.models} are free; --models "
            "names another disk"
        )
    return sizes


def room_for(task: Task) -> Room:
    cuda = check_driver(os.environ)
    free = device_free_bytes(cuda)
    if free is None:  # an instance of a divided GPU: only a context shows it
        driver = Driver(0, cuda)
        driver.ensure_context()
        free, _ = driver.memory_info()
    task.models.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in task.models.rglob("*.safetensors"))
    disk = shutil.disk_usage(task.models).free + there
    return Room(free, total_bytes(cuda), psutil.virtual_memory().available, disk)


def made(task: Task, say: Say, sizes: Sizes) -> tuple[Model, Model]:
    """Make both checkpoints, as entries of a server's configuration."""
    nbytes = sizes.big_bytes + sizes.mid_bytes
    say.step(f"making {nbytes / 1e9:.1f} GB of random weights")
    before_s = time.perf_counter()
    settings = {
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": sizes.kv_bytes,
        "compilation_config": dict(GRAPHS),
    }
    big, mid = (
        Model(alias, checkpoints.make(task.models / alias, shape, SEEDS[alias]), settings)
        for alias, shape in ((BIG, sizes.big), (MID, sizes.mid))
    )
    say.fact("made", "making the models", time.perf_counter() - before_s, "s")
    return big, mid
