"""Where vLLM inspects a model's class."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from vllm_hotswap.launch.inspection import RUN, inspected_here, inspected_together


def run(look: object) -> object:
    """Let vLLM inspect a class, as its registry of models does."""
    from vllm.model_executor.models import registry

    return getattr(registry, RUN)(look)


def die_in_a_pool() -> str:
    """End the process, if it is one that was made to inspect classes."""
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    return "alone"


def test_a_check_looks_in_its_own_process() -> None:
    """Within its block, a check inspects classes in its own process."""
    from vllm.model_executor.models import registry

    before = getattr(registry, RUN)

    with inspected_here():
        assert os.getpid() == run(os.getpid)

    assert before is getattr(registry, RUN)


@pytest.mark.wide
def test_a_start_looks_in_one_process_for_all_models() -> None:
    """A start inspects all models in one other process, then gone; a death there has a fallback."""
    with inspected_together():
        first, second = run(os.getpid), run(os.getpid)
        other = run(die_in_a_pool)

    assert first == second
    assert os.getpid() != first
    assert "alone" == other
    assert [] == multiprocessing.active_children()
