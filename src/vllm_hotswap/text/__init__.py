"""Text of requests: large JSON, scanned in turns, and half surrogates."""

from __future__ import annotations

from vllm_hotswap.text import json_scan, surrogates
from vllm_hotswap.text.json_scan import MAX_TEXT_BYTES, Member, TooLong, as_utf8, scan
from vllm_hotswap.text.surrogates import HalfSurrogate, as_escape, check_texts, message_of

__all__ = [
    "MAX_TEXT_BYTES",
    "HalfSurrogate",
    "Member",
    "TooLong",
    "as_escape",
    "as_utf8",
    "check_texts",
    "json_scan",
    "message_of",
    "scan",
    "surrogates",
]
