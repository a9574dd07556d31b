"""A complete server without vLLM: fake engines, in this process or in a host process."""
