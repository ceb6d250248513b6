"""docs/symptoms.md speaks of every rule that a run can trip over, and of none that there is not."""

import re
from pathlib import Path

from llm_pg.config.schema import LEAVES
from llm_pg.doctor.live import LIVE_RULES
from llm_pg.doctor.static import STATIC_RULES
from llm_pg.metrics import METRICS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "symptoms.md").read_text(encoding="utf-8")


def test_every_rule_on_a_run_has_its_place_among_the_symptoms() -> None:
    named = set(re.findall(r"\[`([a-z-]+)`\]", PAGE))
    assert set(LIVE_RULES) <= named
    assert named <= set(LIVE_RULES) | set(STATIC_RULES)


def test_every_setting_and_metric_that_is_named_exists() -> None:
    text = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    spoken = re.findall(r"`([^`]+)`", re.sub(r"\[`[^`]+`\]", "", text))
    words = {word for one in spoken for word in re.findall(r"(?<![\w/.-])([a-z]+(?:_[a-z]+)+)(?=\b)", one)}
    prefixes = [name.rstrip("/") for name in METRICS if name.endswith("/")]
    known = set(LEAVES) | set(METRICS) | set(prefixes) | {"hacked_reward", "sequence_sum"}
    assert len(words) > 20
    assert words <= known, sorted(words - known)
