"""A server under mixed load, switched and killed for minutes, and every request accounted for."""
