"""Floods: what one client that sends as much as it can takes from another one.

`python -m benchmarks.floods` starts a server on the tiny models, floods it in one way after
the other, and notes how long another key's requests wait before, during and after, what becomes of
health checks and admin calls, and the memory of the server.
"""
