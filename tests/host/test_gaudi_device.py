"""The stand-in for a Gaudi itself: counted memory, and distinct devices.

Runs under `make rehearse-gaudi`; elsewhere there is no `hpu`.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("habana_frameworks") is None:
    pytest.skip("there is no device hpu", allow_module_level=True)

from habana_frameworks.torch._device import Books, books

from tests.gaudi_standin.common import held_by_another


@pytest.fixture(autouse=True)
def everything_is_given_back() -> Iterator[None]:
    """Each test releases everything, to the byte."""
    before = books().held
    yield
    gc.collect()
    assert before == books().held


def grown(before: Books) -> int:
    return books().held - before.held


def asked(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Return the answer of a separate process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_tensor_is_counted_where_it_is_made_and_where_it_goes() -> None:
    before = books()
    made = torch.ones(1000, dtype=torch.bfloat16, device="hpu")
    assert "hpu:0" == str(made.device)
    assert 2000 == grown(before)
    del made
    assert 0 == grown(before)


def test_what_an_operation_makes_is_counted() -> None:
    some = torch.ones(100, 50, device="hpu")
    before = books()
    product = some.t() @ some
    assert "hpu" == product.device.type
    assert 50 * 50 * 4 == grown(before)
    assert torch.equal(torch.full((50, 50), 100.0), product.cpu())


def test_a_view_is_on_its_base_and_takes_nothing() -> None:
    base = torch.zeros(4, 6, device="hpu")
    before = books()
    view = base[1:3, ::2].t().unsqueeze(0)
    view += 1
    assert base.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
    assert 0 == grown(before)
    assert 6 == int(base.sum())


def test_a_copy_without_waiting_is_done_at_once() -> None:
    """A copy without waiting is done at once and pins nothing, whatever torch was built for."""
    made = torch.arange(5, device="hpu").to("cpu", non_blocking=True)
    assert (list(range(5)), False) == (made.tolist(), made.is_pinned())


def test_a_module_moves_to_the_host_and_back() -> None:
    module = torch.nn.Linear(30, 20).to("hpu")
    weight, size = module.weight.detach().cpu(), (30 * 20 + 20) * 4
    before = books()
    module.to("cpu")
    assert -size == grown(before)
    assert size == books().to_host - before.to_host
    module.to("hpu")
    assert 0 == grown(before)
    assert torch.equal(weight, module.weight.detach().cpu())


def test_tensors_of_the_host_are_refused_beside_its_own() -> None:
    there, here = torch.ones(3, device="hpu"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.linear(there.view(1, 3), here.view(1, 3))


def test_what_is_too_large_is_refused_and_leaves_nothing() -> None:
    before = books()
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(before.limit + 1, dtype=torch.uint8, device="hpu")
    assert before.held == books().held
    assert (before.limit - before.held, before.limit) == torch.hpu.mem_get_info()


def test_new_memory_is_not_a_number() -> None:
    """New memory is NaN, so that reading it before writing does not look like zeros."""
    code = (
        "import torch; made = torch.empty(5, dtype=torch.bfloat16, device='hpu'); "
        "print(bool(made.isnan().all()), torch.empty(2, dtype=torch.int64, device='hpu').tolist())"
    )
    assert "True [-1, -1]" == asked(code, FAKEHPU_DIRTY="1").stdout.strip()


@pytest.mark.parametrize("question", ["torch.ones(3, device='hpu')", "torch.hpu.mem_get_info()"])
def test_the_device_is_of_one_process_until_its_end(tmp_path: Path, question: str) -> None:
    """A second process is refused, as on a Gaudi; one that only imports torch does not count."""
    board = {"FAKEHPU_BOARD": str(tmp_path)}
    code = f"import torch; print(torch.hpu.device_count()); {question}"
    with held_by_another(tmp_path):
        second = asked(code, **board)

    assert (1, "1\n") == (second.returncode, second.stdout)
    assert "synStatus=8 [Device not found] Device acquire failed." in second.stderr
    assert 0 == asked(code, **board).returncode


def test_what_is_reserved_is_not_what_is_held() -> None:
    """Reserved memory is not held memory: its meaning on a Gaudi is unknown, so it is unused."""
    made = torch.ones(1000, device="hpu")
    assert torch.hpu.memory_reserved() == torch.hpu.mem_get_info()[1] > torch.hpu.memory_allocated()
    del made


def test_an_operation_may_resize_its_output() -> None:
    out = torch.empty(0, device="hpu")
    torch.cat([torch.ones(5, device="hpu"), torch.zeros(3, device="hpu")], out=out)
    assert [1.0] * 5 + [0.0] * 3 == out.tolist()
    assert 8 * 4 == out.untyped_storage().nbytes()


def test_data_of_a_parameter_is_replaced() -> None:
    """A parameter's data can be replaced, as weight loaders and sleeping workers do."""
    parameter = torch.nn.Parameter(torch.zeros(5, device="hpu"))
    before = books()
    parameter.data = torch.ones(7, device="hpu")
    assert (7 - 5) * 4 == grown(before)
    assert 7 == float(parameter.sum())


def test_a_parameters_view_in_inference_mode_is_a_usual_tensor() -> None:
    """A parameter's view in inference mode is a usual tensor, with which layers multiply."""
    weight = torch.nn.Parameter(torch.arange(6.0, device="hpu").view(2, 3), requires_grad=False)
    with torch.inference_mode():
        there = torch.ones(1, 3, device="hpu")
        product = torch.nn.functional.linear(there, weight)
        assert (True, False) == (product.is_inference(), weight.t().is_inference())
    assert [[3.0, 12.0]] == product.tolist()


def test_looking_up_a_row_that_is_not_there_is_no_error() -> None:
    """A lookup of row -1, the plugin's padding of positions, is not an error."""
    table = torch.arange(6.0, device="hpu").view(3, 2)
    found = table.index_select(0, torch.tensor([1, -1, 7], device="hpu"))
    assert [2.0, 3.0] == found[0].tolist()
    assert (3, 2) == tuple(found.shape)


def test_row_minus_one_is_written_as_the_last() -> None:
    """Row -1 is written as the last, where the plugin has its block for padding."""
    cache = torch.zeros(4, 2, device="hpu")
    cache.index_copy_(0, torch.tensor([1, -1], device="hpu"), torch.ones(2, 2, device="hpu"))
    assert [0.0, 2.0, 0.0, 2.0] == cache.sum(1).tolist()


def test_a_number_outside_of_the_classes_is_of_none() -> None:
    """A class outside the range is none, as the plugin marks unused blocks."""
    found = torch.nn.functional.one_hot(torch.tensor([1, -1, 2], device="hpu"), num_classes=2)
    assert [[0, 1], [0, 0], [0, 0]] == found.tolist()


def test_a_mixture_of_experts_adds_what_each_token_is_to_have_of_each() -> None:
    """A token that selects an expert of another device gets nothing from it here."""
    data = torch.ones(3, 2, device="hpu")
    gate_and_up = torch.tensor([[1.0, 1.0], [2.0, 0.0]], device="hpu")  # inner size 1
    back = torch.tensor([[1.0], [10.0]], device="hpu")
    found = torch.ops.hpu.mixture_of_experts(
        hidden_states=data,
        expert_routing_table=torch.tensor([[4, 5], [5, 5], [4, 9]], device="hpu"),
        router_weights=torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]], device="hpu"),
        w12=[gate_and_up, 2 * gate_and_up],
        w3=[back, back],
        permuted_weights=True,
        activation="silu",
        experts_min=4,
        experts_max=5,
    )
    silu = torch.nn.functional.silu
    first, second = float(silu(torch.tensor(2.0))) * 2, float(silu(torch.tensor(4.0))) * 4
    amounts = [0.5 * first + 0.5 * second, second, 0.5 * first]
    for amount, row in zip(amounts, found.tolist(), strict=True):
        assert pytest.approx([amount, 10 * amount], rel=1e-5) == row


def test_a_group_of_hccl_reduces_what_is_on_the_device() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("hccl", store=store, rank=0, world_size=1)
    try:
        tensor = torch.ones(3, device="hpu")
        torch.distributed.all_reduce(tensor)
        assert [1.0] * 3 == tensor.tolist()
    finally:
        torch.distributed.destroy_process_group()
