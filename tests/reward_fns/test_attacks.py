"""Every shipped reward function against completions that no work went into (fault row S5)."""

import time

import pytest

from llm_pg.rewards import RewardError, Scorer, probe_rewards
from llm_pg.rewards.audit.probes import PAYLOADS, probe_texts
from reward_fns import countdown, number_guessing, registry, sort_letters

SUMS = [
    {"prompt": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in ((2, 3), (17, 25), (100, 4), (60, 1), (9, 9))
]
PERSON = {"type": "object", "required": ["name", "age"], "properties": {"age": {"type": "integer"}}}
TOPICS = [{"prompt": "Describe a person."}, {"prompt": "Describe another."}]

# For each function: the spec, rows to attack it on, and a completion that earns its full range on the first row.
SUBJECTS = {
    "countdown": ("countdown", countdown.prompts(0, 5), countdown.demonstrations(0, 5)[0]["completion"]),
    "exact_match": ("exact_match", SUMS, "5"),
    "format_regex": ({"function": "format_regex", "pattern": r"(\w+ ?)+!"}, TOPICS, "well done!"),
    "format_tags": ("format_tags", TOPICS, "<think>hm</think>\n<answer>no</answer>"),
    "json_schema": ({"function": "json_schema", "schema": PERSON}, TOPICS, '{"name": "A", "age": 3}'),
    "length_penalty": ({"function": "length_penalty", "max_length": 64, "cushion": 32}, TOPICS, "short"),
    "math_equivalence": ("math_equivalence", SUMS, r"\boxed{\frac{10}{2}}"),
    "number_guessing": (
        "number_guessing",
        number_guessing.prompts(0, 5),
        number_guessing.demonstrations(0, 5)[0]["completion"],
    ),
    "number_match": ("number_match", SUMS, "I think it is 5."),
    "repetition_penalty": ("repetition_penalty", TOPICS, "no word here twice"),
    "sort_letters": ("sort_letters", sort_letters.prompts(0, 5), sort_letters.demonstrations(0, 5)[0]["completion"]),
}
SHIPPED_HERE = {
    name
    for name, shipped in registry.rewards().items()
    if not shipped.function.__module__.endswith((".code", ".code_sets", ".judge", ".reasoning_gym"))
}


def test_every_shipped_function_is_attacked():
    """`code` and `code_sets` run model text in the sandbox, `judge` asks a server, `reasoning_gym` needs its library:
    they have their own."""
    assert set(SUBJECTS) == SHIPPED_HERE


@pytest.mark.faults
@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_no_completion_without_work_earns_above_the_floor_hangs_or_runs(name):
    spec, rows, _ = SUBJECTS[name]
    info = registry.rewards()[name].info
    findings = probe_rewards([spec], [row["prompt"] for row in rows], rows, deadline=8.0)
    assert len(findings) == len(probe_texts("", rows[0], rows, "/x"))
    above = [finding for finding in findings if finding.highest is None or finding.highest > info.floor]
    assert above == []
    assert [finding for finding in findings if finding.ran_code or finding.problems] == []


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_a_right_completion_earns_the_high_end(name):
    spec, rows, right = SUBJECTS[name]
    with Scorer([spec], workers=1) as scorer:
        scores = scorer.grade([rows[0]["prompt"]], [right], [[1] * 8], [rows[0]])
    assert scores.reward == [registry.rewards()[name].info.high]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["countdown", "number_match", "sort_letters", "format_tags", "json_schema"])
def test_a_million_characters_cost_under_a_third_of_a_second(name):
    spec, rows, _ = SUBJECTS[name]
    options = spec if isinstance(spec, dict) else {}
    options = {key: value for key, value in options.items() if key != "function"}
    function = registry.rewards()[name].function
    function("warm", **{**rows[0], **options})  # imports are not the text's doing
    for text in ("1," * 500_000, "(" * 1_000_000, "<answer>" * 125_000, "[" * 1_000_000, "9" * 1_000_000):
        start = time.process_time()
        function(text, **{**rows[0], **options})
        assert time.process_time() - start < 0.3


@pytest.mark.faults
def test_the_probes_find_a_function_that_runs_its_input_or_pays_for_nothing(tmp_path):
    (tmp_path / "naive.py").write_text(
        "def runs(completion):\n    return float(eval(completion) is None)\n\n"
        "def pays(completion, answer):\n    return float(answer in completion or not completion)\n"
    )
    findings = probe_rewards(
        [f"{tmp_path}/naive.py:runs", f"{tmp_path}/naive.py:pays"], [row["prompt"] for row in SUMS], SUMS, deadline=0.5
    )
    ran = {finding.probe for finding in findings if finding.ran_code}
    assert "code 0 as '...'" in ran
    paid = {finding.probe for finding in findings if finding.function == "pays" and finding.highest == 1.0}
    assert {"nothing", "all answers, in a line", "every number to 999"} <= paid
    assert "junk" not in paid
    hung = {finding.probe for finding in findings if "deadline" in finding.problems and finding.function == "runs"}
    assert "tower of powers" in hung


def test_the_payloads_do_create_their_file_when_they_are_run(tmp_path):
    """Otherwise the attack would prove nothing."""
    for number, payload in enumerate(PAYLOADS[:3]):
        marker = tmp_path / f"marker{number}"
        eval(payload.format(marker=marker))  # noqa: S307 - the attack itself, on a folder of the test
        assert marker.exists()


def test_a_hostile_number_in_a_row_is_an_error_of_the_row_and_not_a_hang():
    with Scorer(["number_match"], workers=1) as scorer, pytest.raises(RewardError, match="ValueError"):
        scorer.grade(["p"], ["5"], [[1]], [{"answer": "no number"}])
