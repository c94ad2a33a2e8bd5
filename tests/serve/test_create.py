"""`ftray create` with our own endpoint as the teacher, held to a JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

from ftray.config.creation import Creation
from ftray.evaluate.create import create
from tests.serve.conftest import Running


def test_our_own_endpoint_as_the_teacher(open_endpoint: Running, tmp_path: Path) -> None:
    creation = Creation.model_validate(
        {
            "name": "own",
            "output": str(tmp_path / "own"),
            "rows": 3,
            "teacher": {"url": open_endpoint.url, "model": "base", "response": "json_schema", "at_once": 3}
            | {"sampling": {"max_tokens": 120, "temperature": 0.8}},
            "ask": {
                "name": "instructions",
                "topics": ["brie", "feta"],
                "prompt": "Tell me about {topic}.",
                "rows_per_call": 1,
            },
            "filters": {"near": None, "refuse": []},
            "patience": 40,
        }
    )
    facts, why = create(creation, lambda event: None)
    assert why is None
    rows = [json.loads(line) for line in (tmp_path / "own/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert len({(row["instruction"], row["output"]) for row in rows}) == 3
    assert facts["tokens"]["prompt"] > 0
    assert facts["teacher"]["called_itself"] == ["base"]
