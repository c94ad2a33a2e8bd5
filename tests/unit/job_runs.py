"""A run file that the tests of jobs send, and find again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

RUN: dict[str, Any] = {
    "name": "a",
    "model": {"path": "embedded"},
    "method": {"name": "lora", "rank": 4},
    "data": {"sources": [{"path": "rows.jsonl", "format": "text"}], "max_length": 64},
    "train": {"steps": 4},
    "output": "s3://bucket/a",
}


def write(file: Path, **changes: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(RUN | changes))
