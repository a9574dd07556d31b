"""Fused kernels and operators of the device, by torch's own on the CPU."""

from habana_frameworks.torch.hpex import kernels, normalization, operators

__all__ = ["kernels", "normalization", "operators"]
