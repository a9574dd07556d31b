"""`python -m vllm_hotswap.entrypoints.openai.multi_model_api_server [flags of vllm serve]`.

The start of the quickstart: the YAML file is named by `VLLM_HPU_MULTI_MODEL_CONFIG` (or
`VLLM_HOTSWAP_CONFIG`). Without either variable this is vLLM's own, single-model server.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping, Sequence

from vllm_hotswap import start_folder

if __name__ == "__main__":
    start_folder.leave()

from vllm_hotswap.cli import main as cli  # from where it belongs
from vllm_hotswap.config import CONFIG_VARIABLES


def config_path(environment: Mapping[str, str]) -> str | None:
    """The YAML file that the environment names, None if it names none."""
    return next((environment[name] for name in CONFIG_VARIABLES if environment.get(name)), None)


def main(argv: Sequence[str]) -> int:
    """Serve the configured models, or hand over to vLLM. Returns the exit status."""
    path = config_path(os.environ)
    if path is None:
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
        return 0
    return cli.main(["serve", path, *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
