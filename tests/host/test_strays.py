"""Tensors in vLLM's globals that lie in one model's memory are replaced by copies elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_hotswap.host.strays import move_out


class Holder:
    """A stand-in for an object of vLLM's."""

    __module__ = "vllm.of_a_test"

    def __init__(self, tensor: torch.Tensor) -> None:
        self.val = tensor


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = ModuleType("vllm.of_a_test")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def in_reach_of(*tensors: torch.Tensor) -> Any:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}.__contains__


def test_tensors_of_the_process_are_moved_out_of_a_models_memory(module: Any) -> None:
    """A tensor in a model's memory is moved with its values, wherever vLLM holds it."""
    one, two, three, four = (torch.full((4,), float(n)) for n in range(4))
    module.workspace, module.by_size = one, {8: two}
    module.buffers, module.handle = [None, three], Holder(four)

    moved = move_out(in_reach_of(one, two, three, four))

    place = "vllm.of_a_test:"
    expected = {"workspace", "by_size[8]", "buffers[1]", "handle.val"}
    assert {place + name for name in expected} == set(moved)
    now = [module.workspace, module.by_size[8], module.buffers[1], module.handle.val]
    for number, (before, after) in enumerate(zip((one, two, three, four), now, strict=True)):
        assert before.data_ptr() != after.data_ptr()
        assert [float(number)] * 4 == after.tolist()


def test_one_tensor_in_two_places_is_still_one(module: Any) -> None:
    """One tensor in two places is still one: a write in one is read in the other."""
    module.first = module.second = tensor = torch.zeros(4)

    move_out(in_reach_of(tensor))

    assert module.first is module.second is not tensor


def test_tensors_that_lie_elsewhere_stay(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors elsewhere stay, and so does what is not vLLM's."""
    module.elsewhere, inside = torch.zeros(4), torch.zeros(4)
    other = ModuleType("somebody")
    other.tensor = inside  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody", other)
    before = module.elsewhere

    assert [] == move_out(in_reach_of(inside))
    assert module.elsewhere is before
