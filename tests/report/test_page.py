"""What the page says, told from its data and its text; how it looks and behaves is tested in a browser beside this."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_rows import token_row

from llm_pg.cli import main
from llm_pg.doctor.evidence import read_run
from llm_pg.report import leave_report, write_report
from llm_pg.report.charts import charts
from llm_pg.report.completions import spread
from llm_pg.report.page import differences, linked, visible
from llm_pg.report.svg import Chart, Frame, Series, ticks

MakeRun = Callable[..., Path]


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_the_page_of_200_steps_of_long_completions_stays_under_3_mb(make_run: MakeRun) -> None:
    def rows(step: int) -> list[dict[str, Any]]:
        pieces = [f" word{(step * 7 + i) % 5000}" for i in range(256)]
        return [token_row(step, g, k, pieces) for g in range(4) for k in range(4)]

    run = make_run(steps=200, rows=rows)
    assert sum(f.stat().st_size for f in (run / "completions").iterdir()) > 20_000_000
    page = write_report([run])
    assert page.stat().st_size < 3_000_000
    data = data_of(page)
    steps = sorted({row["s"] for row in data["rows"]})
    assert (data["steps_shown"], data["steps_there"]) == ([len(steps)], [200])
    assert {1, 200} <= set(steps)
    assert max(b - a for a, b in pairwise(steps)) <= 50


def test_a_beginning_of_the_spread_is_spread_evenly_and_all_of_it_is_everything() -> None:
    assert list(spread(5))[:3] == [4, 0, 2]
    for count in (0, 1, 2, 7, 100):
        assert sorted(spread(count)) == list(range(count))


def test_tokens_carry_weight_logp_and_the_log_ratio_to_the_reference(make_run: MakeRun) -> None:
    data = data_of(write_report([make_run(steps=1)]))
    row = data["rows"][1]
    assert [data["pieces"][i] for i in row["t"]] == ["a", " b", "</s>"]
    assert [v / data["scale"] for v in row["a"]] == [-0.5, -1.0, -1.5]
    assert [v / data["scale"] for v in row["l"]] == [-0.5, -0.6, -0.7]
    assert row["k"] / data["scale"] == 0.25  # the same for all tokens, kept once


def test_settings_that_differ_are_shown_with_both_values(make_run: MakeRun) -> None:
    runs = [read_run(make_run("a")), read_run(make_run("b", learning_rate=1e-3, algorithm="rloo"))]
    assert dict(differences(runs)) == {
        "algorithm.name": ["grpo", "rloo"],
        "train.learning_rate": ["1e-06", "0.001"],
    }


def test_a_single_run_is_compared_with_the_defaults(make_run: MakeRun) -> None:
    found = dict(differences([read_run(make_run(learning_rate=1e-3))]))
    assert found["train.learning_rate"] == ["1e-06", "0.001"]
    assert "rollout.temperature" not in found


def test_pass_rates_come_with_their_intervals(make_run: MakeRun) -> None:
    text = write_report([make_run()]).read_text()
    assert "25.0 % <small>[20.0 %, 30.0 %]" in text
    assert "75.0 % <small>[70.0 %, 80.0 %]" in text


def test_a_run_without_a_finished_step_has_a_page(make_run: MakeRun) -> None:
    run = make_run(steps=1)
    (run / "metrics.jsonl").write_text("")
    (run / "summary.json").unlink()
    (run / "before.json").unlink()
    (run / "completions" / "step-000001.jsonl").unlink()
    page = write_report([run])
    assert "no step is finished yet" in page.read_text()
    assert data_of(page)["steps_there"] == [0]
    assert data_of(page)["charts"] == []


def test_what_the_doctor_finds_is_on_the_page(make_run: MakeRun) -> None:
    run = make_run()
    lines = [json.loads(line) | {"truncated": 0.5} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report([run]).read_text()
    assert "cut by the length limit" in text
    assert '<a href="https://arxiv.org/abs/2503.14476" rel="noreferrer">arXiv 2503.14476</a>' in text


def test_a_source_is_escaped_before_it_is_linked() -> None:
    assert str(linked("<b> arXiv 1606.06565")).startswith("&lt;b&gt; <a href=")


def test_the_name_of_a_run_cannot_bring_markup_into_the_page(make_run: MakeRun) -> None:
    run = make_run()
    hostile = run.rename(run.with_name("<img src=x onerror=alert(1)>"))
    text = write_report([hostile]).read_text()
    assert "<img" not in text
    assert "&lt;img src=x" in text


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\u202e", "\u2066", "\ufeff", "\ud800"])
def test_characters_that_could_disturb_are_shown_by_number(character: str) -> None:
    assert visible(f"a{character}b") == f"a⟨U+{ord(character):04X}⟩b"


def test_the_command_writes_the_page_where_it_is_told(make_run: MakeRun, tmp_path: Path, capsys: Any) -> None:
    assert main(["report", str(make_run()), "--out", str(tmp_path / "deep" / "page.html")]) == 0
    assert (tmp_path / "deep" / "page.html").is_file()
    assert str(tmp_path / "deep" / "page.html") in capsys.readouterr().out


def test_a_folder_without_a_run_is_bad_input(tmp_path: Path, capsys: Any) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_page_that_fails_is_a_warning_at_the_end_of_a_run(make_run: MakeRun) -> None:
    run = make_run()
    (run / "before.json").write_text('{"greedy": {"mean": 0.5}}')
    said: list[str] = []
    assert leave_report(run, said.append) == []
    assert len(said) == 1
    assert "llm-pg report" in said[0]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3e-7, 4e-7), (5.0, 5.1), (0.0, 23456.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 7
    assert all(low - 1e-9 * (high - low) <= m <= high + 1e-9 * (high - low) for m in marks)
    gaps = {f"{b - a:.3e}" for a, b in pairwise(marks)}
    assert len(gaps) == 1
    assert next(iter(gaps))[:3] in {"1.0", "2.0", "2.5", "5.0"}


def test_all_of_a_chart_lies_inside_its_drawing() -> None:
    chart = Chart("t", "", "", [Series("s", [(1, -2.0), (9, 7.0)], [(1, -3.0, -1.0), (9, 6.0, 8.0)])])
    frame = Frame(chart)
    assert 0 < frame.y(8.0) < frame.y(-3.0) < 190
    assert 0 < frame.x(1) < frame.x(9) < 360


def test_a_curve_of_zeros_that_says_nothing_is_left_out(make_run: MakeRun) -> None:
    assert "Truncated" not in [chart.title for chart in charts([read_run(make_run())])]


def test_ratio_and_entropy_of_tokens_reach_the_page_and_unknown_ones_stay_unknown(make_run: MakeRun) -> None:
    def rows(step: int) -> list[dict[str, Any]]:
        trained, left_out = (token_row(step, 0, k, ["a", " b", "</s>"]) for k in (0, 1))
        trained["tokens"] |= {"entropy": [1.5, 0.25, None], "ratio": [1.0, 1.0, 1.0]}
        return [trained, left_out]

    data = data_of(write_report([make_run(steps=1, rows=rows)]))
    assert (data["rows"][0]["e"], data["rows"][0]["q"]) == ([1500, 250, None], 1000)
    assert "e" not in data["rows"][1]
    assert "q" not in data["rows"][1]


def test_several_runs_are_one_table_with_differences_from_the_first(make_run: MakeRun) -> None:
    first, second = make_run("first"), make_run("second", 30)
    summary = json.loads((second / "summary.json").read_text())
    summary["pass_rate_after_interval"] = [0.5, 0.4, 0.6]
    (second / "summary.json").write_text(json.dumps(summary))
    page = write_report([first, second]).read_text()
    table = page.split('id="comparison"')[1].split("</table>")[0]
    greedy = table.split('<th scope="row">greedy</th>')[1].split("</tr>")[0]
    assert "75.0 % <small>[70.0 %, 80.0 %]</small></td>" in greedy
    assert '50.0 % <small>[40.0 %, 60.0 %]</small><small class="below">-25.0 points</small>' in greedy
    assert "-30" in table.split('<th scope="row">steps</th>')[1].split("</tr>")[0]
    assert 'id="comparison"' not in write_report([first]).read_text()
