"""Tiny models of different architectures, and plain vLLM's answers for each."""
