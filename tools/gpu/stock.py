"""Phase `stock`: vLLM's own sleep mode, level 1, in turns with ours, on the same model.

Both servers run side by side, and only the model whose turn it is is awake. Relies on, in vLLM 0.26
to 0.33: `--enable-sleep-mode`, and with `VLLM_SERVER_DEV_MODE` the routes `/sleep` and `/wake_up`.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field

from benchmarks.servers import Launcher, Model
from benchmarks.stats import alternate
from tools.gpu.client import Client, different
from tools.gpu.device import GIB, total_bytes
from tools.gpu.goals import BIG
from tools.gpu.large import made, sizes_for
from tools.gpu.results import Say
from tools.gpu.serving import in_s
from tools.gpu.sizes import Sizes
from tools.gpu.task import Rounds, Task
from tools.gpu.tiny import model as tiny_model
from vllm_hotswap.host.cuda_driver import check_driver

HOME = "home"
OURS, STOCK = "ours", "vLLM's own"
PUBLISHED = "best published first correct token from asleep, 8B on an H100"
PUBLISHED_S = 0.59
THEIRS_S = 90.0
"""For vLLM's own sleep or wake: its server may not answer once its engine has died."""
TURNS, OF_A_REHEARSAL = 6, 2


@dataclass
class Side:
    """One server whose model sleeps. Mutable: its samples."""

    client: Client
    is_ours: bool
    wanted: list[int] = field(default_factory=list)
    down_ms: list[float] = field(default_factory=list)
    up_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    different: int = 0

    async def sleep(self) -> None:
        if self.is_ours:
            await self.client.switch(HOME)
            self.down_ms.append(await self.client.sleep(BIG))
        else:
            async with asyncio.timeout(THEIRS_S):
                self.down_ms.append((await self.client.post("/sleep?level=1", {}))[0])

    async def wake(self) -> float:
        if self.is_ours:
            return await self.client.switch(BIG)
        async with asyncio.timeout(THEIRS_S):
            return (await self.client.post("/wake_up", {}))[0]

    async def begin(self) -> None:
        """Record the answer before it has slept; then its first sleep."""
        if self.is_ours:
            await self.client.switch(BIG)
        _, self.wanted = await self.client.answer(BIG)
        await self.sleep()

    async def turn(self) -> None:
        up_ms = await self.wake()
        token_ms, token = await self.client.answer(BIG, 1)
        self.up_ms.append(up_ms)
        self.first_ms.append(up_ms + token_ms)
        self.different += different(token, self.wanted[:1])
        self.different += different((await self.client.answer(BIG))[1], self.wanted)
        await self.sleep()

    def tell_first(self, say: Say, name: str, who: str) -> None:
        say.fact(f"first_sleep_s.{name}", f"{who}: first sleep", in_s(self.down_ms[:1]), "s")

    def tell(self, say: Say, name: str, who: str) -> None:
        say.fact(f"sleep_s.{name}", f"{who}: later sleeps", in_s(self.down_ms[1:]), "s")
        say.fact(f"wake_s.{name}", f"{who}: wake", in_s(self.up_ms), "s")
        say.fact(f"first_s.{name}", f"{who}: first token from asleep", in_s(self.first_ms), "s")


def run(task: Task, say: Say) -> None:
    sizes = sizes_for(task)
    model, _ = made(task, say, sizes)
    share = utilization(sizes, total_bytes(check_driver(os.environ)))
    asyncio.run(_compare(task, say, model, share, sizes.is_8b))


def utilization(sizes: Sizes, device_total: int) -> float:
    """Return what vLLM is to find free for its model; with less it refuses to start."""
    needed = sizes.big_bytes + sizes.kv_bytes + 2 * GIB
    return round(min(0.9, max(0.02, needed / device_total)), 3)


async def _compare(task: Task, say: Say, model: Model, share: float, is_8b: bool) -> None:
    home = tiny_model(HOME, "qwen")
    launcher = Launcher(task.out / "servers")
    say.step("starting our server")
    async with launcher.hotswap(model, home) as our_server:
        ours = Side(Client(our_server.port), is_ours=True)
        await ours.begin()
        ours.tell_first(say, "ours", OURS)
        say.step("starting vLLM's own server")
        async with launcher.plain(
            model,
            arguments=["--enable-sleep-mode", f"--gpu-memory-utilization={share}"],
            variables={"VLLM_SERVER_DEV_MODE": "1"},
        ) as their_server:
            theirs = Side(Client(their_server.port), is_ours=False)
            await theirs.begin()
            theirs.tell_first(say, "stock", STOCK)
            sides = {"hotswap": ours, "plain": theirs}
            turns = OF_A_REHEARSAL if task.is_rehearsal else TURNS
            try:
                for side in Rounds(task).of(alternate(turns)):
                    await sides[side].turn()
            finally:
                ours.tell(say, "ours", OURS)
                theirs.tell(say, "stock", STOCK)
            _judge(say, ours, theirs)
            if is_8b:
                say.fact("published", PUBLISHED, PUBLISHED_S, "s")


def _judge(say: Say, ours: Side, theirs: Side) -> None:
    say.check("different", "ours: different tokens", ours.different == 0, ours.different)
    say.fact("different.stock", "vLLM's own: different tokens", theirs.different)
    say.fact("same", "both answer the same", ours.wanted == theirs.wanted)
