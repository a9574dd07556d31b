"""Embeddings of a fake engine: made up, and the same for the same text every time."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from typing import Any

DIMENSIONS = 8
"""Of an embedding."""


def inputs_of(given: Any) -> list[Any]:
    """Of an embedding: a text, a list of ids, or several of either."""
    is_many = isinstance(given, list) and not all(isinstance(item, int) for item in given)
    return given if is_many else [given]


def vector_of(value: object, is_packed: bool) -> list[float] | str:
    """Of length 1, and another one for every other text."""
    digest = hashlib.sha256(json.dumps(value).encode()).digest()[: 2 * DIMENSIONS]
    numbers = [number - 32767.5 for (number,) in struct.iter_unpack("<H", digest)]
    length = math.hypot(*numbers)
    vector = [number / length for number in numbers]
    if not is_packed:
        return vector
    return base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector)).decode()
