"""Get plain vLLM's answers: `python -m tests.zoo.plain FOLDER OUT ALIAS ...`.

The checkpoints are made first. Then, for each model, a child process is forked from this one, which
has imported vLLM and run nothing. So every answer comes from a process that never had another
model, at the cost of a load. Lines on standard output report progress: `made`, then aliases.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.zoo.models import PROMPTS, TOKENS, ZOO, Model
from tests.zoo.questions import PAIR, PICTURE
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.host.vllm_names import find
from vllm_hotswap.launch.inspection import inspected_here


def main() -> None:
    folder, out, *aliases = sys.argv[1:]
    making = fork(lambda: make_checkpoints(Path(folder)))
    import_vllm()
    models = [model for model in ZOO if model.alias in aliases or not aliases]
    at_once = max(1, len(os.sched_getaffinity(0)) // 2)
    with inspected_here():
        looking = fork(lambda: look_at_architectures(models))
        for what, child in {"the making of checkpoints": making, "a look": looking}.items():
            if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                sys.exit(f"{what} ended with {told(status)}")
        print("made", flush=True)
        answer_all(in_order(models, aliases), Path(folder), Path(out), at_once)


def make_checkpoints(folder: Path) -> None:
    from tests.zoo.make import MAKERS, make

    for name in MAKERS:
        make(name, folder)


def import_vllm() -> None:
    """Import what every child needs, and compute nothing: a fork would lose OpenMP's threads."""
    import compressed_tensors  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.v1.attention.backends.cpu_attn
    import vllm.v1.core.sched.scheduler
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    find("make_arg_parser")


def in_order(models: Sequence[Model], aliases: Sequence[str]) -> Sequence[Model]:
    return sorted(models, key=lambda model: aliases.index(model.alias)) if aliases else models


def look_at_architectures(models: Sequence[Model]) -> None:
    """Fill vLLM's cache of architectures' abilities, for the children and for the server."""
    from vllm.model_executor.models import registry

    for architecture in {model.architecture for model in models}:
        with suppress(Exception):  # a request for the model gets the error again
            registry.ModelRegistry.models[architecture].inspect_model_cls()


def answer_all(models: Sequence[Model], folder: Path, out: Path, at_once: int) -> None:
    """Write the answers of each model, or vLLM's error, to `out / (alias + ".json")`."""
    under_way: dict[int, Model] = {}
    for model in models:
        if len(under_way) == at_once:
            finish_one(under_way, out)
        under_way[fork(lambda model=model: answer(model, folder, out))] = model
    while under_way:
        finish_one(under_way, out)


def answer(model: Model, folder: Path, out: Path) -> None:
    (out / f"{model.alias}.json").write_text(json.dumps(answers_or_error(model, folder)))


def finish_one(under_way: dict[int, Model], out: Path) -> None:
    child, status = os.wait()
    model = under_way.pop(child)
    if status:
        how = told(os.waitstatus_to_exitcode(status))
        (out / f"{model.alias}.json").write_text(json.dumps({"error": f"it ended with {how}"}))
    print(model.alias, flush=True)


def told(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def fork(do: Callable[[], Any]) -> int:
    """Run it in a child process, with prints on standard error. Return the child's process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.dup2(2, 1)
        do()
        status = 0
    except BaseException:  # noqa: BLE001  # the parent's code must not run in the child
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def answers_or_error(model: Model, folder: Path) -> dict[str, Any]:
    from vllm import LLM

    try:
        llm = LLM(str(model.folder(folder)), **model.settings(folder))
        return {"answers": QUESTIONS[model.asks](llm, model)}
    except Exception as error:  # noqa: BLE001  # vLLM's error is a possible answer
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def texts(llm: Any, model: Model) -> list[Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    adapter = model.adapter and LoRARequest("it", 1, str(MODELS / "adapters" / model.adapter))
    asked = [llm.generate(p, sampling, lora_request=adapter or None) for p in PROMPTS]
    return [[list(o.token_ids), o.text] for [request] in asked for o in request.outputs]


def embeddings(llm: Any, model: Model) -> list[Any]:
    return [llm.embed(prompt)[0].outputs.embedding for prompt in PROMPTS]


def classes(llm: Any, model: Model) -> list[Any]:
    return [llm.classify(prompt)[0].outputs.probs for prompt in PROMPTS]


def scores(llm: Any, model: Model) -> list[Any]:
    return [llm.score(*PAIR)[0].outputs.score]


def rewards(llm: Any, model: Model) -> list[Any]:
    asked = [llm.encode(p, pooling_task="token_classify") for p in PROMPTS]
    return [output.outputs.data.tolist() for [output] in asked]


def pictures(llm: Any, model: Model) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    [output] = llm.chat(PICTURE, sampling)
    return [[list(output.outputs[0].token_ids), output.outputs[0].text]]


def sounds(llm: Any, model: Model) -> list[Any]:
    import numpy as np
    from vllm import SamplingParams

    sound = np.sin(np.arange(16000) / 10).astype(np.float32)
    prompt = {"prompt": "<|begin|>", "multi_modal_data": {"audio": (sound, 16000)}}
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    [output] = llm.generate(prompt, sampling)
    return [[list(output.outputs[0].token_ids), output.outputs[0].text]]


QUESTIONS: dict[str, Callable[[Any, Model], list[Any]]] = {
    "text": texts,
    "embedding": embeddings,
    "classes": classes,
    "score": scores,
    "reward": rewards,
    "picture": pictures,
    "sound": sounds,
}

if __name__ == "__main__":
    main()
