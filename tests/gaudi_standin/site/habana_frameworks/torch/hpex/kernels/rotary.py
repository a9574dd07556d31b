from __future__ import annotations

import enum

import torch


class RotaryPosEmbeddingMode(enum.Enum):
    BLOCKWISE = 0
    PAIRWISE = 1


def apply_rotary_pos_emb(
    data: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    offset: int = 0,
    mode: RotaryPosEmbeddingMode = RotaryPosEmbeddingMode.BLOCKWISE,
) -> torch.Tensor:
    """`data` [tokens, heads, size], `cos` and `sin` [tokens, 1, size] as the mode wants them.

    Raises `NotImplementedError` for positions, which the plugin does not give.
    """
    if position_ids is not None or offset:
        raise NotImplementedError("the stand-in has no positions of its own")
    if mode is RotaryPosEmbeddingMode.BLOCKWISE:
        first, second = data.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-data[..., 1::2], data[..., ::2]), dim=-1).flatten(-2)
    return (data * cos + turned * sin).to(data.dtype)
