"""`torch.ops.hpu`: those that a dense model's attention reaches."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("hpu", "DEF")

LIBRARY.define(
    "block_softmax_adjustment(Tensor block_max, Tensor block_sums, Tensor block_groups, "
    "SymInt batch_size, SymInt[] out_shape) -> Tensor"
)


def block_softmax_adjustment(
    block_max: torch.Tensor,
    block_sums: torch.Tensor,
    block_groups: torch.Tensor,
    batch_size: int,
    out_shape: list[int],
) -> torch.Tensor:
    """The factor of each block, with which the blocks of a sequence add up to one softmax.

    `block_max` and `block_sums` are [blocks, heads..., 1, 1]; `block_groups` [blocks] names the
    sequence of each block, `batch_size` or less than 0 for blocks of none. Returns `out_shape`.
    """
    blocks = block_max.shape[0]
    largest = block_max.reshape(blocks, -1).float()
    sums = block_sums.reshape(blocks, -1).float()
    groups = torch.where(block_groups < 0, batch_size, block_groups).long()
    start = largest.new_full((batch_size + 1, largest.shape[1]), -torch.inf)
    of_group = start.index_reduce(0, groups, largest, "amax").index_select(0, groups)
    factor = (largest - of_group).exp()
    part = sums * factor
    whole = torch.zeros_like(start).index_add(0, groups, part).index_select(0, groups)
    return (factor / torch.maximum(whole, part)).to(block_max.dtype).reshape(out_shape)


def shape_of_adjustment(
    block_max: torch.Tensor,
    block_sums: torch.Tensor,
    block_groups: torch.Tensor,
    batch_size: int,
    out_shape: list[int],
) -> torch.Tensor:
    return block_max.new_empty(out_shape)


LIBRARY.impl("block_softmax_adjustment", block_softmax_adjustment, "CPU")
LIBRARY.impl("block_softmax_adjustment", shape_of_adjustment, "Meta")
