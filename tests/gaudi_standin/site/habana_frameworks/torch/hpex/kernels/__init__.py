from habana_frameworks.torch.hpex.kernels.FusedSDPA import FusedSDPA
from habana_frameworks.torch.hpex.kernels.rotary import (
    RotaryPosEmbeddingMode,
    apply_rotary_pos_emb,
)

__all__ = ["FusedSDPA", "RotaryPosEmbeddingMode", "apply_rotary_pos_emb"]
