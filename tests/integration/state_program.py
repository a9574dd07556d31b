"""Programs for `test_vllm_state.py`: engines of unlike models in one process.

`python -m tests.integration.state_program FOLDER PROGRAM ...` writes what each saw to
`FOLDER/PROGRAM.json`. Each is a fork of a process that has imported this module and computed
nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.integration.process_state import Watch  # before vLLM is imported

# isort: split
from tests.integration.hosted import ENGINE_ARGUMENTS, PROMPTS, Hosted
from tests.zoo.make import make
from tests.zoo.plain import fork
from vllm_hotswap.host import loading
from vllm_hotswap.host.state import absent, process_state
from vllm_hotswap.launch.inspection import inspected_here

CHECKPOINTS = {"llama": "llama", "moe": "qwen3-moe", "mamba": "mamba2", "embed": "bert"}
"""The zoo's checkpoints, by kind."""


def orders(folder: Path) -> dict[str, Any]:
    """Load a mixture of experts after a dense model, and compare the answers of each."""
    checkpoints = {kind: make(CHECKPOINTS[kind], folder) for kind in ("llama", "moe", "mamba")}
    llama = Hosted(checkpoints["llama"], "llama")
    seen: dict[str, Any] = {"llama": llama.greedy()}
    moe = Hosted(checkpoints["moe"], "moe")
    seen["moe"] = moe.greedy()
    mamba = Hosted(checkpoints["mamba"], "mamba")
    seen["mamba"] = mamba.greedy()
    engines = {"llama": llama, "moe": moe, "mamba": mamba}
    seen["again"] = {name: engine.greedy() for name, engine in engines.items()}
    seen["broken"] = fails(lambda: Hosted(break_(checkpoints["moe"]), "broken"))
    seen["after_failure"] = {name: engine.greedy() for name, engine in engines.items()}
    for engine in engines.values():
        engine.unload()
        engine.reload()
    before = resources()
    for _ in range(3):
        for engine in engines.values():
            engine.unload()
            engine.reload()
    seen["resources"] = [before, resources()]
    seen["reloaded"] = {name: engine.greedy() for name, engine in engines.items()}
    return seen


def draws(folder: Path) -> dict[str, Any]:
    """Return the unseeded answers of two models while each other is loaded, sleeps and so on."""
    checkpoints = {kind: make(CHECKPOINTS[kind], folder) for kind in ("llama", "moe")}
    llama = Hosted(checkpoints["llama"], "llama", seed=3)
    first = llama.unseeded(2)
    moe = Hosted(checkpoints["moe"], "moe", seed=4)
    of_moe = moe.unseeded(1)
    second = llama.unseeded(1)
    moe.engine.sleep(2)
    second += llama.unseeded(1)
    moe.engine.wake()
    second += llama.unseeded(1)
    of_moe += moe.unseeded(1)
    llama.engine.sleep(2)
    llama.engine.wake()
    second += llama.unseeded(1)
    llama.unload()
    of_moe += moe.unseeded(1)
    llama.reload()
    fails(lambda: Hosted(break_(checkpoints["moe"]), "broken"))
    second += llama.unseeded(2)
    llama.greedy()
    second += llama.unseeded(1)
    return {"llama": first + second, "moe": of_moe + moe.unseeded(1)}


def changes(folder: Path) -> dict[str, Any]:
    """Return the process-wide state of vLLM that each operation has changed."""
    watch = Watch()
    loading.prepare_host()
    process_state()  # reads the state before the first load
    watch.changed()
    seen: dict[str, list[str]] = {}

    def note(name: str, act: Callable[[], Any]) -> Any:
        result = act()
        seen[name] = watch.changed()
        return result

    engines = {}
    for kind in ("llama", "moe", "mamba", "embed"):
        checkpoint = make(CHECKPOINTS[kind], folder)
        engine = note(f"load {kind}", lambda kind=kind, at=checkpoint: Hosted(at, kind))
        ask = engine.pooled if kind == "embed" else lambda engine=engine: answers(engine)
        note(f"ask {kind}", ask)
        engines[kind] = engine
    for kind, engine in engines.items():
        note(f"ask {kind} again", engine.pooled if kind == "embed" else engine.greedy)
    llama = engines["llama"]
    note("sleep", lambda: llama.engine.sleep(2))
    note("wake", llama.engine.wake)
    note("unload", llama.unload)
    note("reload", llama.reload)
    return {"changes": seen, "ranks": ranks(), "absent": absent()}


def worker(_: Path) -> list[int]:
    """Return what a worker process of a compiled model counts."""
    import vllm_hotswap.host.cpu_worker  # noqa: F401  # which vLLM imports first there

    return ranks()


def ranks() -> list[int]:
    """Return what a small function of vLLM counts, beside a model that may be compiled."""
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    torch.compiler.set_stance("default")
    counts = batched_count_greater_than(torch.arange(6.0).view(2, 3), torch.tensor([[0.0], [5.0]]))
    return [int(count) for count in counts]


def answers(engine: Hosted) -> None:
    engine.greedy()
    engine.unseeded()
    engine.ask([5, 6], logprobs=2, top_p=0.9, seed=1)
    engine.ask([5, 6], prompt_logprobs=1, temperature=0)


def alone(folder: Path, kind: str, seed: int) -> dict[str, Any]:
    """Return what plain vLLM answers in a process of its own, without a seed and greedily."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(make(CHECKPOINTS[kind], folder)), seed=seed, **ENGINE_ARGUMENTS)

    def ask(prompt: list[int], temperature: float) -> list[int]:
        params = SamplingParams(
            temperature=temperature, max_tokens=12, ignore_eos=True, detokenize=False
        )
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    unseeded = [ask(PROMPTS[0], 2.0) for _ in range(10)]
    return {"unseeded": unseeded, "greedy": [ask(prompt, 0) for prompt in PROMPTS]}


def fails(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:  # noqa: BLE001  # whatever it is, the test looks at it
        return type(error).__name__
    return "nothing"


def break_(checkpoint: Path) -> Path:
    """Make a copy of a checkpoint with too few weights."""
    from safetensors.torch import load_file, save_file

    folder = checkpoint.with_name(f"broken-{checkpoint.name}")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    first = next(iter(tensors))
    tensors[first] = tensors[first][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def resources() -> dict[str, int]:
    process = psutil.Process()
    return {
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "ports": len(process.net_connections("tcp")),
    }


PROGRAMS: Mapping[str, Callable[[Path], Any]] = {
    "orders": orders,
    "draws": draws,
    "changes": changes,
    "worker": worker,
    "llama": lambda folder: alone(folder, "llama", 3),
    "moe": lambda folder: alone(folder, "moe", 4),
}


def tell(program: str, folder: Path) -> None:
    (folder / f"{program}.json").write_text(json.dumps(PROGRAMS[program](folder)))


def main(at: str, *programs: str) -> int:
    """Run the programs; return how many of them failed."""
    folder = Path(at)
    failed = 0
    for program in programs or PROGRAMS:
        with inspected_here():
            child = fork(lambda program=program: tell(program, folder))
        failed += os.waitpid(child, 0)[1] != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
