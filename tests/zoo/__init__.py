"""A zoo of tiny models of unlike architectures, and what plain vLLM answers for each."""
