"""`python -m vllm_hotswap.host --channel FD`: the engine host process."""

from vllm_hotswap.host.obey import Obedience
from vllm_hotswap.host.process import run

# Worker processes of tensor-parallel models import this module under another name.
if __name__ == "__main__":
    run("vllm_hotswap.host", Obedience)
