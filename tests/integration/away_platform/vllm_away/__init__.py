"""A vLLM platform plugin for tests: vLLM's CPU, with a worker that sleeps by its own means.

vLLM finds it, as any plugin that is installed, by its entry point, where this package's parent
folder is on `PYTHONPATH`.
"""

from __future__ import annotations


def platform() -> str:
    """What vLLM asks a plugin for: the qualified name of its platform."""
    return "vllm_away.platform.AwayPlatform"
