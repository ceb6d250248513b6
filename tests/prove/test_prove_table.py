"""The table that `llm-pg prove` prints: its verdicts, its numbers, and the ways it is printed."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tables
import torch

from llm_pg import prove
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.prove import cases
from llm_pg.prove.measure import BIASED, DIRECTION, EXACT, NOTHING, Line, ProofCase, kind_of, measure
from llm_pg.prove.reasons import DEPARTURES

ROOT = Path(__file__).resolve().parents[2]
CASES = cases.all_cases()


@pytest.fixture(scope="module")
def lines() -> tuple[Line, ...]:
    return prove.table()


def test_every_line_gets_the_verdict_that_it_is_known_to_get(lines: tuple[Line, ...]) -> None:
    assert [line.verdict for line in lines if not line.expected] == []


@pytest.mark.parametrize("page, name", list(tables.BLOCKS), ids=lambda word: word)
def test_a_computed_table_of_a_page_is_what_is_computed(page: str, name: str, lines: tuple[Line, ...]) -> None:
    """Where this fails: python docs/generators/tables.py. Here, because most of them are cut from these lines."""
    assert tables.written(page, name) == tables.BLOCKS[page, name]().strip()


def test_a_verdict_follows_from_the_numbers_beside_it(lines: tuple[Line, ...]) -> None:
    for line in lines:
        if line.kind == EXACT:
            assert line.bias < 1e-10
            assert line.verdict == "exact"
        elif line.kind == DIRECTION:
            assert line.cosine == pytest.approx(1.0, abs=1e-12)
            assert line.bias == pytest.approx(abs(1 - line.scale), rel=1e-8)
        elif line.kind == NOTHING:
            assert (line.cosine, line.scale) == (0.0, 0.0)
        else:
            assert line.cosine < 1.0
            assert line.verdict.startswith("biased: ")


def test_every_algorithm_is_in_the_table_alone_and_beside_another_prompt(lines: tuple[Line, ...]) -> None:
    for section in ("As shipped, one prompt a step", "As shipped, two prompts a step, graded rewards"):
        assert {line.algorithm for line in lines if line.section == section} == set(ALGORITHMS)


def test_every_baseline_meets_every_reduction(lines: tuple[Line, ...]) -> None:
    pairs = {(line.baseline, line.reduction) for line in lines if line.section.startswith("Baseline")}
    assert len(pairs) == 5 * 4


@pytest.mark.parametrize("distance", ["far", "near"])
def test_every_estimate_of_the_kl_stands_in_every_place(lines: tuple[Line, ...], distance: str) -> None:
    found = {(x.kl, x.placement) for x in lines if x.section.startswith("KL penalty alone") and distance in x.section}
    assert found >= {(k, place) for k in ("k1", "k2", "k3") for place in ("reward", "loss")}


def test_scales_of_the_right_directions_are_the_predicted_ones(lines: tuple[Line, ...]) -> None:
    """(n-1)/n where the mean contains itself, 1/horizon under the constant denominator."""
    own = {"group_mean": 2 / 3, "batch_mean": 5 / 6}
    checked = 0
    for line in lines:
        if line.section.startswith("Baseline") and line.reduction in ("sequence_sum", "dr_grpo"):
            constant = 0.5 if line.reduction == "dr_grpo" else 1.0
            assert line.scale == pytest.approx(own.get(line.baseline, 1.0) * constant, rel=1e-10)
            checked += 1
    assert checked == 10


def test_dr_grpo_is_three_quarters_of_a_third_of_the_gradient(lines: tuple[Line, ...]) -> None:
    (line,) = [x for x in lines if x.section == "As shipped, one prompt a step" and x.algorithm == "dr_grpo"]
    assert line.scale == pytest.approx(0.75 / 3, rel=1e-12)
    assert line.verdict == "right direction: itself in the mean, a constant"


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c.make is None and not c.second_pass and not c.spec.entropy_coef and c.expect in (BIASED, NOTHING)
    ],
    ids=lambda case: f"{case.section}/{case.algorithm}/{case.detail}/{case.spec.baseline}/{case.spec.loss_type}",
)
def test_undoing_all_that_is_named_makes_the_line_exact(case: ProofCase) -> None:
    """So the list of departures leaves nothing out."""
    spec, world_spec = case.spec, case.world_spec
    for departure in DEPARTURES:
        if departure.present(spec, world_spec):
            spec, world_spec = departure.remedy(spec, world_spec)
    assert kind_of(measure(spec, world_spec)[0]) == EXACT


def test_blame_falls_only_on_what_is_off_alone(lines: tuple[Line, ...]) -> None:
    """GRPO's own mean only shrinks, so it is not among the reasons for the turn of its update."""
    (line,) = [x for x in lines if x.section == "As shipped, one prompt a step" and x.algorithm == "grpo"]
    assert line.verdict == "biased: group deviation, token mean"


def test_variances_are_relative_to_plain_reinforce(lines: tuple[Line, ...]) -> None:
    (plain,) = [x for x in lines if x.algorithm == "total return" and not x.detail]
    assert plain.variance_ratio == pytest.approx(1.0, rel=1e-12)
    ratio = {x.detail: x.variance_ratio for x in lines if x.algorithm == "gae"}
    assert ratio["exact critic, λ 0"] < ratio["exact critic, λ 0.5"] < ratio["exact critic, λ 1"] < 1  # type: ignore[operator]


def test_json_is_a_list_of_lines_with_their_numbers(lines: tuple[Line, ...], capsys: pytest.CaptureFixture) -> None:
    assert prove.main(as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(lines)
    keys = {"algorithm", "kl", "placement", "reduction", "bias", "cosine", "scale", "variance_ratio", "verdict"}
    assert keys <= set(rows[0])
    (loss_k1,) = [r for r in rows if "far" in r["section"] and (r["kl"], r["placement"]) == ("k1", "loss")]
    assert (loss_k1["cosine"], loss_k1["scale"], loss_k1["variance_ratio"]) == (0.0, 0.0, None)
    assert loss_k1["why"] == "The expected gradient of log π is 0, so this is no penalty at all."


def test_json_can_be_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert prove.main(quick=True, as_json=str(tmp_path / "table.json")) == 0
    assert len(json.loads((tmp_path / "table.json").read_text())) == len(prove.table(quick=True))
    assert capsys.readouterr().out == ""


def test_the_text_holds_every_line_and_explains_every_reason(
    lines: tuple[Line, ...], capsys: pytest.CaptureFixture
) -> None:
    assert prove.main() == 0
    out = capsys.readouterr().out
    for line in lines:
        assert line.verdict in out
        for keyword, sentence in line.reasons:
            assert f"{keyword}: {sentence}" in out
    assert f"{len(lines)} lines: " in out


def test_the_short_table_is_part_of_the_long_one(lines: tuple[Line, ...]) -> None:
    short = prove.table(quick=True)
    assert 20 <= len(short) < len(lines) / 2
    assert set(short) <= set(lines)


def test_a_line_whose_verdict_changed_is_named_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    case = next(c for c in CASES if c.algorithm == "dr_grpo")
    monkeypatch.setattr(prove, "all_cases", lambda: [dataclasses.replace(case, expect=EXACT)])
    monkeypatch.setattr(prove, "table", prove.table.__wrapped__)
    assert prove.main() == 1
    assert "the verdict on As shipped, one prompt a step dr_grpo" in capsys.readouterr().err


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        prove.table.__wrapped__(quick=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_short_table_takes_under_ten_seconds_of_a_core_with_all_imports() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run(
        [sys.executable, "-m", "llm_pg.cli", "prove", "--quick"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.returncode == 0, found.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


@pytest.mark.slow
def test_the_whole_table_takes_under_sixty_seconds_of_a_core() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "llm_pg.cli", "prove"], capture_output=True, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
