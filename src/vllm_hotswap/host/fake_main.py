"""`python -m vllm_hotswap.host.fake_main --channel FD`: the engine host process without vLLM."""

from vllm_hotswap.host.fake import FakeObedience
from vllm_hotswap.host.process import run

if __name__ == "__main__":
    run("vllm_hotswap.host.fake_main", FakeObedience)
