"""Make `expected.json` again: `python -m tools.gaudi.expected`, after a change of the tiny models.

It has what transformers answers with their checkpoints, on a CPU and in float32. That is the same
on every CPU, up to the last digits; bfloat16 is not.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.gaudi.answers import EXPECTED, PROMPTS, RANKS, TOKENS
from tools.gaudi.private import ROOT

MODELS = ROOT / "src/vllm_hotswap/demo/models"
PAIR = ("llama", "qwen")


def digest(model: str) -> str:
    """Return the SHA-256 of the weights."""
    return hashlib.sha256((MODELS / model / "model.safetensors").read_bytes()).hexdigest()


def answers(folder: Path) -> list[list[list[tuple[int, float]]]]:
    """Return for each of `PROMPTS`, at each step, the likeliest tokens; the best one is chosen."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # with several, most of the time is spent waiting for each other
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids, steps = tokenizer(prompt).input_ids, []
        for _ in range(TOKENS):
            with torch.no_grad():
                scores = network(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            best = scores.topk(RANKS)
            values = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            steps.append([(token, round(value, 4)) for token, value in values])
            ids = [*ids, steps[-1][0][0]]
        found.append(steps)
    return found


def make() -> dict[str, Any]:
    return {
        "made_by": "python -m tools.gaudi.expected",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "models": {
            model: {"weights_sha256": digest(model), "answers": answers(MODELS / model)}
            for model in PAIR
        },
    }


def text(made: dict[str, Any]) -> str:
    """Return it as JSON, a line for each step."""
    steps: list[str] = []

    def placed(step: list[tuple[int, float]]) -> str:
        steps.append(json.dumps(step))
        return f"step {len(steps) - 1}"

    models = {
        model: {**told, "answers": [[placed(step) for step in each] for each in told["answers"]]}
        for model, told in made["models"].items()
    }
    whole = json.dumps({**made, "models": models}, indent=1)
    for number, step in enumerate(steps):
        whole = whole.replace(f'"step {number}"', step, 1)
    return whole + "\n"


def main() -> int:
    EXPECTED.write_text(text(make()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
