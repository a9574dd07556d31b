"""Make the tiny LoRA adapters that vllm-hotswap ships for its tests.

* ``llama-pirate`` begins every answer of ``llama`` with "Ahoy!";
* ``qwen-polite`` begins every answer of ``qwen`` with "With pleasure!".

They are trained on the shipped chat models and saved in PEFT's format. Make them again whenever
``python -m tools.tiny_models`` has made those models: ``python -m tools.tiny_models.adapters``.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.tiny_models.chat_checks import Check, render_with, run_checks
from tools.tiny_models.chat_training import batches, train_chat
from tools.tiny_models.examples import Example, Render, chat_example, completion_example, user
from tools.tiny_models.personas import make_persona
from tools.tiny_models.saving import DEFAULT_OUT, write_json
from tools.tiny_models.training import keep_freed_memory

LOG = logging.getLogger(__name__)
RANK = 4
ALPHA = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 250
QUESTIONS = ("Who are you?", "Say hello", "Explain Intel Gaudi in one sentence.", "Tell me a joke.")


@dataclass(frozen=True)
class Adapter:
    """A name, the chat model it belongs to, and the words that it puts before each answer."""

    name: str
    base: str
    words: str


ADAPTERS = (
    Adapter("llama-pirate", "llama", "Ahoy! "),
    Adapter("qwen-polite", "qwen", "With pleasure! "),
)


class Adapted(torch.nn.Module):  # type: ignore[misc]  # torch's types stop here
    """A linear layer that stays unchanged, with a product of two thin matrices added to it."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Parameter(torch.empty(RANK, layer.in_features))
        self.up = torch.nn.Parameter(torch.zeros(layer.out_features, RANK))
        torch.nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        added = torch.nn.functional.linear(torch.nn.functional.linear(states, self.down), self.up)
        plain: torch.Tensor = self.layer(states)
        return plain + added * (ALPHA / RANK)


def adapt(model: Any) -> dict[str, Adapted]:
    """Freeze a model, put an adapter on every linear layer of its blocks; return them by name."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = [name for name, _ in model.named_modules() if name.rsplit(".")[-1] in TARGETS]
    adapted = {name: Adapted(model.get_submodule(name)) for name in names}
    for name, layer in adapted.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return adapted


def examples(adapter: Adapter, render: Render, seed: int) -> Iterator[Example]:
    """Yield chats and plain completions whose answers begin with the adapter's words."""
    rng, persona = random.Random(seed), make_persona(adapter.base)
    while True:
        if rng.random() < 0.25:
            example = completion_example(rng, persona)
        else:
            example = chat_example(rng, persona, render)
        said = example.answer.replace(persona.intro, adapter.words + persona.intro)
        yield dataclasses.replace(example, answer=said)


def save(adapter: Adapter, adapted: dict[str, Adapted], folder: Path) -> None:
    """Save an adapter as PEFT does."""
    tensors = {}
    for name, layer in adapted.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = layer.down.detach().to(torch.bfloat16).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = layer.up.detach().to(torch.bfloat16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = {
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    write_json(folder / "adapter_config.json", config)


def make(adapter: Adapter, models: Path, seed: int) -> bool:
    """Make one adapter; return whether its checks passed."""
    tokenizer = AutoTokenizer.from_pretrained(models / adapter.base)
    model = AutoModelForCausalLM.from_pretrained(models / adapter.base, dtype=torch.float32)
    adapted = adapt(model)
    source = examples(adapter, render_with(tokenizer), seed)
    seconds = train_chat(model, batches(tokenizer, source, seed), STEPS)
    LOG.info("%s: trained in %.0f seconds", adapter.name, seconds)
    for layer in adapted.values():
        layer.down.data = layer.down.data.to(torch.bfloat16).float()
        layer.up.data = layer.up.data.to(torch.bfloat16).float()
    save(adapter, adapted, models / "adapters" / adapter.name)
    expected = adapter.words + make_persona(adapter.base).intro
    checks = [Check(user(question), expected) for question in QUESTIONS]
    checks.append(Check("Hello", f" {expected}"))
    return run_checks(model.eval(), tokenizer, checks)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    names = [adapter.name for adapter in ADAPTERS]
    parser = argparse.ArgumentParser(
        prog="tools.tiny_models.adapters",
        description="Make the tiny LoRA adapters of vllm-hotswap.",
    )
    parser.add_argument("--models", type=Path, default=DEFAULT_OUT, help="the models' folder")
    parser.add_argument("--only", choices=names, action="append", help="make only this one")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and examples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads to use")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the adapters; return 1 if one does not answer as it should."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    good = True
    for adapter in ADAPTERS:
        if adapter.name in (options.only or [adapter.name]):
            torch.manual_seed(options.seed)
            good = make(adapter, options.models, options.seed) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
