"""Attention over whole prompts, in float32."""

from __future__ import annotations

import torch


def is_gqa(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[1] != key.shape[1]


class FusedSDPA:
    @staticmethod
    def apply(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        softmax_mode: str = "fast",
        recompute: bool | None = None,
        valid_seq_len: torch.Tensor | None = None,
        padding_side: str = "left",
        is_amax_s: bool = False,
        is_amax_o: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`query` [batch, heads, tokens, size]; `key` and `value` with as many or fewer heads.

        Raises `NotImplementedError` for windows, sinks, and padding on the left.
        """
        if sinks is not None or (window_size is not None and tuple(window_size) != (-1, -1)):
            raise NotImplementedError("the stand-in's attention has no windows and no sinks")
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1).float()
        value = value.repeat_interleave(groups, dim=1).float()
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query.float() @ key.transpose(-1, -2) * factor
        rows, columns = scores.shape[-2:]
        device = scores.device
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            else:
                scores = scores + attn_mask.float()
        if is_causal:
            later = torch.ones(rows, columns, dtype=torch.bool, device=device).triu(
                1 + columns - rows
            )
            scores = scores.masked_fill(later, float("-inf"))
        if valid_seq_len is not None:
            if padding_side != "right":
                raise NotImplementedError("the stand-in pads on the right")
            length = valid_seq_len.to(device).view(-1, 1, 1, 1)
            beyond = torch.arange(columns, device=device).view(1, 1, 1, -1) >= length
            scores = scores.masked_fill(beyond, float("-inf"))
        return scores.softmax(-1).nan_to_num().matmul(value).to(query.dtype)
