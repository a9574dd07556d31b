"""The mode `auto` on the real backend: traces of requests for three models, under two policies."""
