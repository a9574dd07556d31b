"""`torch.ops.hpu`: those that attention and mixtures of experts reach, in bfloat16."""

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


LIBRARY.define(
    "mixture_of_experts(Tensor hidden_states, Tensor expert_routing_table, Tensor router_weights, "
    "Tensor[] w12, Tensor[] w3, bool permuted_weights, str activation, int experts_min, "
    "int experts_max, int chunk_size=0, int total_experts=0) -> Tensor"
)

ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}


def mixture_of_experts(
    hidden_states: torch.Tensor,
    expert_routing_table: torch.Tensor,
    router_weights: torch.Tensor,
    w12: list[torch.Tensor],
    w3: list[torch.Tensor],
    permuted_weights: bool,
    activation: str,
    experts_min: int,
    experts_max: int,
    chunk_size: int = 0,
    total_experts: int = 0,
) -> torch.Tensor:
    """What the experts `experts_min` to `experts_max` add to each token, in float32.

    `hidden_states` [tokens, size]; the table and the weights [tokens, experts of a token]; of each
    expert `w12` [2 x inner, size], the gate first, and `w3` [size, inner].

    Raises `NotImplementedError` for weights that are not permuted.
    """
    if not permuted_weights:
        raise NotImplementedError("the stand-in's experts have permuted weights")
    data = hidden_states.float()
    added = torch.zeros_like(data)
    for number, (into, back) in enumerate(zip(w12, w3, strict=True), experts_min):
        share = torch.where(expert_routing_table == number, router_weights, 0).sum(-1, keepdim=True)
        gate, up = (data @ into.float().t()).chunk(2, dim=-1)
        added += share.float() * ((ACTIVATIONS[activation](gate) * up) @ back.float().t())
    return added.to(hidden_states.dtype)


def shape_of_mixture(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(hidden_states)


LIBRARY.impl("mixture_of_experts", mixture_of_experts, "CPU")
LIBRARY.impl("mixture_of_experts", shape_of_mixture, "Meta")
