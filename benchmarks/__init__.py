"""The benchmark: an HTTP client that compares this server with plain vLLM on one machine.

`python -m benchmarks` starts the servers, measures, prints tables and writes one JSON
file with every raw sample. Nothing here imports vLLM or looks into the servers.
"""
