"""Handlers of our own routes."""
