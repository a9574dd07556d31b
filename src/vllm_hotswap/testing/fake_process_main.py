"""The engine host process without vLLM; its arguments are those of `vllm_hotswap.host`."""

from vllm_hotswap.host import run
from vllm_hotswap.testing.fake_process_host import FakeCommandHandler

if __name__ == "__main__":
    run("vllm_hotswap.testing.fake_process_main", FakeCommandHandler)
