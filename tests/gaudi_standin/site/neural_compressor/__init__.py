"""A stand-in for Intel Neural Compressor, which quantises nothing. See `torch.quantization`."""
