"""`python -m tools.tiny_models`: make the models."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tools.tiny_models.chat import make_llama, make_qwen
from tools.tiny_models.classify import make_classify
from tools.tiny_models.embed import make_embed
from tools.tiny_models.saving import DEFAULT_OUT
from tools.tiny_models.training import Job, keep_freed_memory

LOG = logging.getLogger(__name__)

MAKERS: dict[str, Callable[[Job], bool]] = {
    "llama": make_llama,
    "qwen": make_qwen,
    "embed": make_embed,
    "classify": make_classify,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="tools.tiny_models", description="Make the tiny models of vllm-hotswap."
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the models")
    parser.add_argument(
        "--only", choices=sorted(MAKERS), action="append", help="make only this model; repeatable"
    )
    parser.add_argument(
        "--continue",
        type=int,
        default=0,
        dest="more",
        metavar="STEPS",
        help="continue training the chat models for STEPS steps; use a seed not used before",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and examples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads to use")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the models; return 1 if a model does not answer as it should."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # the optimiser makes many, and they are slow
    keep_freed_memory()
    good = True
    for name in options.only or list(MAKERS):
        LOG.info("making %s", name)
        torch.manual_seed(options.seed)
        job = Job(options.out / name, options.seed, options.more)
        good = MAKERS[name](job) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
