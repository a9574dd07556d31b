"""Several models, one at a time, from one vLLM engine process, switched over HTTP."""

__version__ = "0.1.0"
