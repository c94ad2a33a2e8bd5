"""Loaded by schemathesis: half of the generated bodies name a model that is there, and none asks for many tokens."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict) or "model" not in body:
        return body
    if len(str(body)) % 2:
        body = {**body, "model": ["base", "acme/cheese"][len(str(body)) % 4 // 2]}
    for key in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(key), int) and body[key] > 4:
            body = {**body, key: 4}
    return body if {"max_tokens", "max_completion_tokens"} & body.keys() else {**body, "max_tokens": 4}
