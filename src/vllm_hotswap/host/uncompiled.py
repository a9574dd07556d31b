"""Importing this makes vLLM run its small functions as they are written, on CPU.

vLLM decorates some (counting ranks for log-probabilities is one) so that they are compiled at their
first call, also beside compiled models. All models would wait for the C++ compiler for 10 s to
20 s, and once more for another number of requests. Import this before the modules with such
functions, in the engine host and in each worker process.

Relies on: `simple_compile_backend` being read when such a module is imported. Checked on vLLM
0.32.0.
"""

from __future__ import annotations

from vllm.platforms import current_platform

if current_platform.is_cpu():
    current_platform.simple_compile_backend = "eager"
