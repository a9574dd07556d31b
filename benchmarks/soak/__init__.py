"""The soak: a server under mixed load, switched and killed for minutes; each request counted."""
