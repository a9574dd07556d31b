"""`make check-gpu`: whether vllm-hotswap works on the NVIDIA GPU of this machine, and how fast.

`check` is the program, `phase` runs one phase in a process of its own; `pack` and `unpack` bring it
to a machine without a network.
"""
