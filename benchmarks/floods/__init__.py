"""Floods: how one client that sends as much as it can affects another client.

`python -m benchmarks.floods` starts a server on the tiny models, and floods it in one way after
another. It records how long another key's requests wait before, during and after each flood, the
results of health checks and admin calls, and the memory of the server.
"""
