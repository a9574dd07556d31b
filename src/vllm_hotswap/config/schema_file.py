"""The JSON schema of the YAML file, as it ships. `python -m tools.reference` makes it."""

from __future__ import annotations

from pathlib import Path

SCHEMA = Path(__file__).parent / "models.schema.json"
"""Contains every flag that may be a key of a model, as the newest vLLM of `RUN_ON` has them."""
