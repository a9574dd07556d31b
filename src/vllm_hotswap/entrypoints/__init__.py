"""Entry points under the names that users of vLLM's Gaudi plugin know."""
