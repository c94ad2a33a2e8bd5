"""Takes credentials out of text that leaves the machine: logs, cards, reports, trackers. No torch, no Ray."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")
_SECRET = r"(?:api_?key|access_?key|secret|password|passwd|token|sig|signature|credential)"
_QUERY = re.compile(rf"(?i)([?&][\w.-]*{_SECRET}[\w.-]*=)[^&\s'\"#]+")
_ASSIGNED = re.compile(rf"(?i)(\b[\w-]*{_SECRET}\b['\"]?\s*[=:]\s*['\"]?)(?!\*\*\*)[A-Za-z0-9_\-./+=]{{12,}}")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9_\-./+=]{8,}")


def redact(text: str) -> str:
    """`text` with `***` for user names and passwords in URIs, secret query parameters and header values."""
    text = _USER.sub("***", text)
    text = _QUERY.sub(r"\1***", text)
    text = _BEARER.sub(r"\1 ***", text)
    return _ASSIGNED.sub(r"\1***", text)


def redact_values(value: Any) -> Any:
    """`redact` on every string inside lists and mappings."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value
