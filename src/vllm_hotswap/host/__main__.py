"""`python -m vllm_hotswap.host --channel FD`: the engine host process."""

from vllm_hotswap.host.commands import VllmCommandHandler
from vllm_hotswap.host.process import run

if __name__ == "__main__":
    run("vllm_hotswap.host", VllmCommandHandler)
else:  # a worker process of a tensor-parallel model imports this module under another name
    import vllm_hotswap.host.gloo  # noqa: F401
