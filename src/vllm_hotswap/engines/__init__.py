"""The engine protocol and its two implementations."""
