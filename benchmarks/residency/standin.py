"""A process that loads models with transformers and drops them again: `standin.py RUNS FOLDER...`.

It does the essential work of `transformers serve` without a server, for where that cannot run. It
prints one JSON object per load.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any


def main(runs: int, folders: list[str]) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for _ in range(runs):
        for folder in folders:
            started_s = time.perf_counter()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            loaded_s = time.perf_counter()
            _first_token(model, tokenizer)
            token_s = time.perf_counter()
            del model, tokenizer
            gc.collect()
            times = (loaded_s - started_s, token_s - loaded_s, time.perf_counter() - token_s)
            print(json.dumps([folder, *times]), flush=True)
    return 0


def _first_token(model: Any, tokenizer: Any) -> None:
    words = "000123 apple"
    model.generate(**tokenizer(words, return_tensors="pt"), max_new_tokens=1, do_sample=False)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
