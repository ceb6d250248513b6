"""A run in a notebook: one output that is brought up to date, in a real kernel too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from llm_pg.doctor.finding import Finding
from llm_pg.evaluate import Evaluation, Interval
from llm_pg.terminal import NotebookTerminal
from llm_pg.terminal.notebook import chart
from llm_pg.terminal.plain import Plan

ROOT = Path(__file__).resolve().parents[2]
PLAN = Plan("a-<run>", "grpo", 40, groups=4, rows=16)


class Shown:
    """What a front end was given: a list of outputs, each the drawings that it had."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []
        self.cell, self.now = 1, 0.0
        self.terminal = NotebookTerminal(show=self.show, cell=lambda: self.cell, now=lambda: self.now)

    def show(self, what: Any, handle: Any) -> Any:
        if handle is None:
            self.outputs.append([])
            handle = self.outputs[-1]
        handle.append(what._repr_mimebundle_()["text/html"])
        return handle


def test_a_run_is_one_output_with_a_bar_curves_and_their_range() -> None:
    shown = Shown()
    shown.terminal.begin(PLAN)
    for step in range(1, 41):
        shown.now += 3.0
        shown.terminal.step({"step": step, "reward": step / 40, "kl": 0.5, "seconds": 3.0}, 3.0)
    assert len(shown.outputs) == 1
    last = shown.outputs[0][-1]
    assert '<progress value="1.0000" max="1"' in last
    assert "step 40 of 40" in last
    assert "<b>1.000</b>" in last
    assert "0.025 to 1" in last
    assert last.count("<polyline") == 2  # reward and KL
    assert "a-&lt;run&gt;" in last
    assert "left 30 s" in shown.outputs[0][-11]


def test_it_is_drawn_at_most_twice_a_second() -> None:
    shown = Shown()
    shown.terminal.begin(PLAN)
    for step in range(1, 40):
        shown.now += 0.01
        shown.terminal.step({"step": step, "reward": 0.5, "seconds": 0.01}, 0.01)
    assert len(shown.outputs[0]) <= 2


def test_what_is_made_in_one_cell_and_runs_in_another_is_drawn_in_both() -> None:
    shown = Shown()
    shown.terminal.phase("load", True)
    shown.now = 2.0
    shown.terminal.phase("load", False)
    assert "Loading the model and the data: 2 s" in shown.outputs[0][-1]
    shown.cell = 2
    shown.terminal.begin(PLAN)
    assert len(shown.outputs) == 2
    assert "Loading" not in shown.outputs[1][-1]


def test_warnings_findings_and_the_table_of_the_end_are_in_it_and_nothing_of_a_completion_is_markup() -> None:
    shown = Shown()
    terminal = shown.terminal
    terminal.begin(PLAN)
    terminal.warn("careful <b>")
    terminal.finding(Finding("rule", "problem", "the cause.", "the evidence", "the change", "a source"))
    terminal.step({"step": 1, "reward": 0.5, "seconds": 1.0}, 1.0)
    row = {"prompt": "<script>", "completion": "<img>", "reward": 1.0, "parts": {}}
    shown.now = 60.0
    terminal.sample(1, [row])
    share = Interval(0.5, 0.4, 0.6)
    result = Evaluation(4, share, None, {}, 3.0, 0, [{"prompt": "<i>", "completion": "c", "passed": True}])
    terminal.summary({"seconds_by_phase": {}, "seconds_total": 1.0}, result, result, ["Page: <here>"])
    last = shown.outputs[0][-1]
    for wanted in ("careful &lt;b&gt;", "the cause.", "&lt;script&gt;", "Page: &lt;here&gt;", "50.0% [40.0%, 60.0%]"):
        assert wanted in last, wanted
    assert not re.search(r"<(script|img|i|b|here)>(?!problem|warning|grpo|0\.500)", last)


def test_a_small_chart_climbs_from_its_lowest_to_its_highest_value() -> None:
    found = re.search(r'points="([^"]*)"', chart([(1, 0.0), (2, 5.0), (3, 10.0)]))
    assert found
    points = [tuple(map(float, point.split(","))) for point in found[1].split()]
    assert points == [(2.0, 30.0), (109.0, 17.0), (216.0, 4.0)]
    many = re.search(r'points="([^"]*)"', chart([(i, float(i)) for i in range(5000)]))
    assert many
    assert len(many[1].split()) <= 202


MAKE = """
from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.model.loading import character_tokenizer, load_model
from llm_pg.config.schema import ModelConfig
sizes = dict(model_type="llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
tokenizer = character_tokenizer()
trainer = GRPOTrainer(
    model=load_model(ModelConfig(make=sizes), tokenizer, seed=0), processing_class=tokenizer,
    reward_funcs=lambda completion, **row: float(completion[:1].isdigit()),
    args=GRPOConfig("runs", max_steps=4, prompts_per_step=2, num_generations=2, max_completion_length=4,
                    num_eval_prompts=2, eval_num_samples=0, use_cpu=True, reward_in_process=True),
    train_dataset=[{"prompt": f"{i}+1="} for i in range(8)],
)
"""


@pytest.mark.slow
def test_a_real_kernel_keeps_one_output_a_cell_without_lines_or_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [nbformat.v4.new_code_cell(text) for text in (MAKE, "trainer.train();")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    made, trained = (cell.outputs for cell in notebook.cells)
    assert [out.output_type for out in [*made, *trained]] == ["display_data", "display_data"]
    assert "Loading the model and the data" in made[0].data["text/html"]
    html = trained[0].data["text/html"]
    assert "step 4 of 4" in html
    assert "<polyline" in html
    assert "pass rate, greedy" in html
    assert "step 4 of 4" in trained[0].data["text/plain"]
