"""What a run's folder holds can be read by any reader of JSON."""

import json
import math
from pathlib import Path
from typing import Any

from llm_pg import GRPOConfig
from llm_pg.run.saving.folder import RunFolder


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_number_that_json_does_not_have_is_null_in_completions_and_summary(tmp_path: Path) -> None:
    folder = RunFolder(GRPOConfig(str(tmp_path), run_name="run"))
    folder.path.mkdir()
    folder.write_completions(3, [{"reward": math.nan, "tokens": {"ratio": [1.0, math.inf]}, "text": "NaN"}])
    folder.write_summary({"pass_rate_after": -math.inf, "seconds": {"sample": 1.5}})
    row = strict((folder.path / "completions" / "step-000003.jsonl").read_text())
    assert row == {"reward": None, "tokens": {"ratio": [1.0, None]}, "text": "NaN"}
    summary = strict((folder.path / "summary.json").read_text())
    assert summary == {"pass_rate_after": None, "seconds": {"sample": 1.5}}
