"""What a server of two models has to show, whatever their size: every residency, and no drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.residency.processes import held
from benchmarks.servers import Launcher, Model, Server
from tools.gpu.client import Client, different
from tools.gpu.device import MIB, used_bytes
from tools.gpu.goals import COLD_DRIFT_MIB, drift
from tools.gpu.results import Say
from tools.gpu.task import Rounds, Task
from vllm_hotswap.host.devices import anonymous_bytes

GRAPHS: Mapping[str, Any] = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8],
}
"""Without torch.compile, whose start takes minutes."""

GRAPHS_WORDS = "Graph capturing finished"
"""vLLM 0.26 to 0.33 log it after each capture."""

BAD_WORDS = ("Traceback", "event=tensors_left", "event=memory_kept", "event=device_taken")


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each is done."""

    parked: int
    cycles: int
    cold: int


@dataclass
class Story:
    """One server, and what has been seen of it. Mutable: the tokens, and the rounds."""

    say: Say
    task: Task
    client: Client
    pair: tuple[str, str]
    wanted: dict[str, list[int]] = field(default_factory=dict)
    different: int = 0
    asked: int = 0
    rounds: Rounds = field(init=False)

    def __post_init__(self) -> None:
        self.rounds = Rounds(self.task)

    def other(self, model: str) -> str:
        return self.pair[model == self.pair[0]]

    async def expect(self) -> None:
        """Record what both answer before anything has moved; twice, because they must agree."""
        for model in self.pair:
            await self.client.switch(model)
            first_ms, self.wanted[model] = await self.client.answer(model)
            self.say.fact(f"answer.{model}", f"{model}: first answer, 32 tokens", first_ms, "ms")
            await self.check(model)

    async def check(self, model: str) -> None:
        """Count the tokens that differ from before."""
        _, found = await self.client.answer(model)
        self.asked += 1
        self.different += different(found, self.wanted[model])

    async def parked(self, count: int) -> None:
        self.say.step(f"{count} switches to a parked model")
        samples: list[float] = []
        try:
            for number in self.rounds.of(range(count)):
                model = self.pair[number % 2]
                await self.client.switch(self.other(model))
                samples.append(await self.client.switch(model))
                if number % 10 < 2:
                    await self.check(model)
        finally:
            self.samples("parked", "switch to a parked model", samples, count)

    async def cycles(self, count: int) -> None:
        """Put both to sleep in turn, and switch back."""
        self.say.step(f"{2 * count} sleeps and wakes")
        down: dict[str, list[float]] = {model: [] for model in self.pair}

        up: dict[str, list[float]] = {model: [] for model in self.pair}
        first: dict[str, list[float]] = {model: [] for model in self.pair}
        used: list[int | None] = []
        asleep: list[int | None] = []
        try:
            for number in self.rounds.of(range(2 * count)):
                model = self.pair[number % 2]
                await self.client.switch(self.other(model))
                down[model].append(await self.client.sleep(model))
                asleep.append(used_mib())
                up[model].append(await self.client.switch(model))
                took_ms, token = await self.client.answer(model, 1)
                first[model].append(up[model][-1] + took_ms)
                self.different += different(token, self.wanted[model][:1])
                await self.check(model)
                used.append(used_mib())
        finally:
            self._cycles_told(down, up, first, count)
        self._growth("asleep", "sleeps and wakes", used, 0.0)
        pairs = zip(used, asleep, strict=True)
        gone = [float(a - b) for a, b in pairs if a is not None and b is not None]
        if gone:
            self.samples("gone", "a sleep gives back", gone, None, "MiB")
            self.say.check("gives", "every sleep gives memory back", min(gone) > 0)

    def _cycles_told(
        self,
        down: dict[str, list[float]],
        up: dict[str, list[float]],
        first: dict[str, list[float]],
        count: int,
    ) -> None:
        for model in self.pair:
            told = (
                ("first_sleep", "first sleep", down[model][:1], None),
                ("sleep", "later sleeps", down[model][1:], None),
                ("asleep", "switch from asleep", up[model], count),
                ("first", "first token from asleep", first[model], None),
            )
            for key, what, found, wanted in told:
                self.samples(f"{key}.{model}", f"{model}: {what}", in_s(found), wanted, "s")

    async def cold(self, count: int) -> None:
        self.say.step(f"{count} switches to a cold model")
        samples: list[float] = []

        used: list[int | None] = []
        try:
            for number in self.rounds.of(range(count)):
                model = self.pair[number % 2]
                await self.client.switch(self.other(model))
                await self.client.unload(model)
                samples.append(await self.client.switch(model))
                await self.check(model)
                used.append(used_mib())
        finally:
            self.samples("cold", "switch to a cold model", in_s(samples), count, "s")
        self._growth("cold", "cold switches", used, COLD_DRIFT_MIB)

    def _growth(self, key: str, what: str, used: list[int | None], most: float) -> None:
        told = [float(value) for value in used if value is not None]
        if not told or len(told) < len(used):
            self.say.fact(f"drift.{key}", f"growth over {what}", "not known here (MIG, or no NVML)")
            return
        grown = drift(told)
        self.say.fact(f"used.{key}", f"device memory after each of the {what}", told, "MiB")
        self.say.check(
            f"drift.{key}", f"growth over {len(told)} {what}", grown <= most, grown, "MiB"
        )

    def samples(
        self, key: str, what: str, found: list[float], count: int | None, unit: str = "ms"
    ) -> None:
        """Report samples, and whether there are fewer than there should be."""
        note = f"{len(found)} of {count}: out of time" if count and len(found) < count else ""
        self.say.fact(key, what, found, unit, note)

    async def end(self, server: Server) -> None:
        """Report what is right or wrong about all of it."""
        self.say.check(
            "different",
            f"different tokens in {self.asked} answers",
            self.different == 0,
            self.different,
        )
        host = (await self.client.status())["host"]
        if pid := host.get("pid"):
            self.say.fact("host_process", "engine host, memory", anonymous_bytes(pid) // MIB, "MiB")
        family = held(server.pid)
        self.say.fact("files", "open files of the server", family.fds)
        log_checks(self.say, server.log, len(self.pair))


def log_checks(say: Say, log: Path, models: int) -> None:
    """Check what its log has to say, and must not say."""
    text = log.read_text(errors="replace")
    captured = text.count(GRAPHS_WORDS)
    say.check("graphs", "captures of CUDA graphs", captured >= models, captured)
    found = [word for word in BAD_WORDS if word in text]
    say.check("log", "errors in the server's log", not found, ", ".join(found) or "none")
    if "event=host_memory_not_pinned" in text:
        say.check("pinned", "host memory of sleeping models is pinned", False, note="see facts")


def used_mib() -> int | None:
    used = used_bytes()
    return None if used is None else used // MIB


def in_s(samples: list[float]) -> list[float]:
    return [value / 1000 for value in samples]


async def serve(task: Task, say: Say, models: tuple[Model, Model], counts: Counts) -> None:
    """Run the whole story, on a server of its own.

    Raises:
        ServerFailed: it does not start, or answers an error; the message has its log.
    """
    launcher = Launcher(task.out / "servers")
    say.step("starting a server, and loading both models")
    async with launcher.hotswap(*models) as server:
        say.fact("start", "start to ready, both loaded", server.health_s, "s")
        say.fact("used", "device memory with both loaded", used_mib(), "MiB")
        story = Story(say, task, Client(server.port), (models[0].alias, models[1].alias))
        await story.expect()
        await story.parked(counts.parked)
        await story.cycles(counts.cycles)
        await story.cold(counts.cold)
        await story.end(server)
