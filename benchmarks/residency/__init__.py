"""The benchmark of the residency ladder: what it costs to bring a model up from each residency.

`python -m benchmarks.residency` starts real servers, measures over HTTP and in /proc,
prints tables, and writes one JSON file, one Markdown file and one plot. Nothing here looks into
the servers.
"""
