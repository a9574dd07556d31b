"""The benchmark of the residency ladder: what bringing a model up costs, from wherever it rests.

`python -m benchmarks.residency` starts real servers, measures over HTTP and in /proc,
prints tables, and writes one JSON file, one Markdown file and one plot. Nothing here looks into
the servers.
"""
