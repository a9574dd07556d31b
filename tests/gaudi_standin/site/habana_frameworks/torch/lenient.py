"""What the device does where a CPU kernel refuses.

The plugin pads positions with -1 and looks their sines up. A Gaudi reads something there that is
never used; the nearest row is read here. It pads slots with -1, too, and writes KV there: the last
row here, which is of the block that it keeps for padding. And it makes vectors of classes from
numbers outside of them, which belong to none.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("aten", "IMPL")


def index_select(data: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    with torch._C._AutoDispatchBelowADInplaceOrView():
        inside = index.clamp(0, data.shape[dim] - 1)
        return torch.ops.aten.index.Tensor(data, [None] * (dim % data.dim()) + [inside])


def index_copy_(
    data: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor
) -> torch.Tensor:
    with torch._C._AutoDispatchBelowADInplaceOrView():
        rows = index.remainder(data.shape[dim])
        return torch.ops.aten.index_put_(data, [None] * (dim % data.dim()) + [rows], source)


def one_hot(classes: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """Make class vectors. Raises `NotImplementedError` for a number of classes to be found out."""
    if num_classes <= 0:
        raise NotImplementedError("the stand-in wants the number of classes")
    known = torch.arange(num_classes, device=classes.device, dtype=classes.dtype)
    return (classes.unsqueeze(-1) == known).long()


LIBRARY.impl("index_copy_", index_copy_, "HPU")
LIBRARY.impl("index_select", index_select, "HPU")
LIBRARY.impl("one_hot", one_hot, "HPU")
