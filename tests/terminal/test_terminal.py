"""What a person sees while a run goes on: sparklines, time left, the screen, plain lines, JSON lines."""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.doctor import Finding
from llm_pg.evaluate import Evaluation, Interval
from llm_pg.metrics import Clock, read_metrics
from llm_pg.terminal import JsonTerminal, LiveTerminal, Terminal, make_terminal
from llm_pg.terminal.board import Board, RunningPhase, draw
from llm_pg.terminal.figures import Pace, duration, harmless, neighbours, sparkline, student_quantile
from llm_pg.terminal.plain import Plan, left_text, sample_lines

ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(8) for b in range(8)]
PLAN = Plan("a-run", "grpo", 40, groups=4, rows=16)
FINDING = Finding("truncation", "warning", "the cause", "the evidence", "the change", "the source")
VALUES = {
    "step": 3,
    "reward": 0.5,
    "kl": 0.0123,
    "entropy": 1.25,
    "completion_length": 7.5,
    "uniform_groups": 0.25,
    "grad_norm": 0.5,
    "memory": 812.0,
    "tokens_per_second": 5000.0,
    "seconds": 3.0,
    "seconds/sample": 1.0,
    "seconds/update": 2.0,
}
ROW = {"prompt": "1+1=", "completion": "2\x1b[31m", "reward": 1.5, "parts": {"right": 1.0, "form": 0.5}}


def screen(board: Board, now: float = 10.0, width: int = 90, height: int = 40) -> str:
    console = Console(width=width, height=height, record=True, file=io.StringIO(), force_terminal=True)
    console.print(draw(board, now, width, height))
    return console.export_text()


def board_of(*steps: dict[str, Any], seconds: float = 3.0) -> Board:
    live = LiveTerminal(console=Console(file=io.StringIO()), now=lambda: 0.0)
    live.begin(PLAN)
    for values in steps:
        live.step(values, seconds)
    assert live.board is not None
    return live.board


def test_a_run_that_is_counted_in_environment_steps_has_lines_at_even_distances_and_its_own_units() -> None:
    out = io.StringIO()
    plain = Terminal(console=Console(file=out, width=200))
    live = LiveTerminal(console=Console(file=io.StringIO()), now=lambda: 0.0)
    for terminal in (plain, live):
        terminal.begin(Plan("a-run", "ppo", 1_000, groups=0, rows=0, logging_steps=250, unit="steps"))
        for k in range(1, 11):  # ten updates of 100 steps, a second each
            terminal.step({"step": k, "steps": 100 * k, "return_mean": 7.0, "entropy": 0.5, "seconds": 1.0}, 1.0)
    assert re.findall(r"steps +(\d+)/1000  return 7.00", out.getvalue()) == ["300", "500", "800", "1000"]
    assert live.board is not None
    assert "steps 1000/1000" in screen(live.board)
    assert "0.500 nats/step" in screen(live.board)
    pace = Pace(1_000)
    for k in range(1, 6):
        pace.observe(100 * k, 1.0, {}, steps=100)
    left = pace.remaining()
    assert left is not None
    assert left.middle == pytest.approx(5.0)


def test_a_sparkline_of_equal_steps_climbs_through_all_levels() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0], 8) == "█▁"
    assert sparkline([3.0, 3.0], 8) == "▅▅"


def test_a_long_series_is_averaged_into_the_width_and_gaps_stay_gaps() -> None:
    assert sparkline([0, 0, 1, 1, 3, 3], 3) == sparkline([0, 1, 3], 3)
    assert sparkline([0, None, 1], 3) == "▁ █"
    assert sparkline([float("nan"), 0, 1, float("inf")], 2) == "▁█"
    assert sparkline([], 5) == ""


@pytest.mark.parametrize(
    "seconds, text", [(0.214, "0.21 s"), (42.3, "42 s"), (59.7, "1:00 min"), (185, "3:05 min"), (7800, "2:10 h")]
)
def test_a_duration_is_read_in_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("freedom, exact, most", [(2, 4.30265, 0.06), (4, 2.77645, 0.01), (20, 2.08596, 0.001)])
def test_the_quantile_of_student_is_near_the_printed_tables(freedom: int, exact: float, most: float) -> None:
    assert abs(student_quantile(0.975, freedom) - exact) < most * exact


def test_the_time_left_of_constant_steps_is_exact() -> None:
    pace = Pace(30)
    for step in range(1, 13):
        pace.observe(step, 2.0, {})
    left = pace.remaining()
    assert left is not None
    assert left == pytest.approx((36.0, 36.0, 36.0))
    assert left_text(left) == "36 s"


def test_evaluations_and_checkpoints_are_counted_apart_from_the_steps() -> None:
    """20 steps of 1 s, an evaluation of 5 s every 4th but not after the last, a checkpoint of 2 s every 5th."""
    pace = Pace(20, {"eval": 4, "save": 5})
    spent = []
    for step in range(1, 21):
        phases = {"eval": 5.0} if step % 4 == 0 and step < 20 else {}
        phases |= {"save": 2.0} if step % 5 == 1 and step > 1 else {}  # told with the step after it
        spent.append(1.0 + sum(phases.values()))
        pace.observe(step, spent[-1], {"sample": 0.4, **phases})
        if step == 7:
            at_7 = pace.remaining()
    assert at_7 is not None
    assert at_7[0] == pytest.approx(sum(spent[7:]))
    assert pace.remaining() == pytest.approx((0.0, 0.0, 0.0))


def test_the_range_of_the_time_left_holds_the_true_time_in_about_19_of_20_runs() -> None:
    draws = random.Random(0)
    hits = 0
    for _ in range(400):
        steps = [draws.lognormvariate(0.0, 0.3) for _ in range(60)]
        pace = Pace(60)
        for number, seconds in enumerate(steps[:15], start=1):
            pace.observe(number, seconds, {})
        left = pace.remaining()
        assert left is not None
        hits += left[1] <= sum(steps[15:]) <= left[2]
    assert 0.90 <= hits / 400 <= 0.995


def test_a_machine_that_is_busy_for_a_while_widens_the_range() -> None:
    draws = random.Random(1)
    alike, level = [], 0.0
    for _ in range(200):
        level = 0.8 * level + draws.gauss(0, 0.1)
        alike.append(2.0 + level)
    shuffled = draws.sample(alike, len(alike))
    assert neighbours(alike) > 0.6
    assert neighbours(shuffled) < 0.2
    paces = [Pace(400), Pace(400)]
    for pace, values in zip(paces, (alike[-50:], shuffled[-50:]), strict=True):
        for number, seconds in enumerate(values, start=1):
            pace.observe(number, seconds, {})
    wide, narrow = (pace.remaining() for pace in paces)
    assert wide is not None
    assert narrow is not None
    assert wide[2] - wide[1] > narrow[2] - narrow[1]


def test_a_range_alone_is_told_until_three_warm_steps_were_seen() -> None:
    pace = Pace(20)
    assert pace.remaining() is None  # nothing was predicted, and nothing is known
    pace.predicted = 20.0, 60.0
    assert pace.remaining() == (None, 20.0, 60.0)
    pace.observe(1, 8.0, {})
    assert pace.remaining() == (None, 19 * 2.0, 19 * 12.0)  # the first step may be up to four times as long as others
    for step in (2, 3):
        pace.observe(step, 3.0, {})
        assert pace.remaining() == (None, (20 - step) * 2.0, (20 - step) * 4.5)
    assert left_text(pace.remaining()) == "34 s to 1:16 min"  # type: ignore[arg-type]
    pace.observe(4, 3.0, {})
    assert pace.remaining() == pytest.approx((48.0, 32.0, 72.0))  # without the first step, and not yet to the second


@pytest.mark.faults
def test_after_ten_steps_the_time_is_right_within_a_factor_of_one_and_a_half_and_the_range_before_holds_it() -> None:
    """A first step six times as long as the others, steps of which a third trains on nothing, completions that get
    shorter by a quarter: what a real run's steps are like, whose time was predicted six times too long."""
    draws = random.Random(3)
    held = right = 0
    for _ in range(200):
        seconds = [draws.choice((1.0, 2.0, 2.0)) * draws.lognormvariate(0, 0.2) * (1 - n / 160) for n in range(40)]
        seconds[0] *= 6
        pace = Pace(40, {"eval": 20}, ("eval",))
        pace.spend("eval", 5.0)
        for number, each in enumerate(seconds[:10], start=1):
            pace.observe(number, each, {})
            if number == 4:
                early = pace.remaining()
                assert early is not None
                held += early.low <= sum(seconds[4:]) + 10 <= early.high
        left = pace.remaining()
        assert left is not None
        assert left.middle is not None
        true, predicted = sum(seconds) + 10, sum(seconds[:10]) + left.middle
        right += predicted / 1.5 < true < predicted * 1.5
    assert right >= 198
    assert held >= 190


def test_the_evaluation_after_the_last_step_is_part_of_the_time_left() -> None:
    pace = Pace(20, {"eval": 5}, ("eval",))
    pace.spend("eval", 7.0)  # that before the first step
    for step in range(1, 13):
        phases = {"eval": 7.0} if step % 5 == 0 else {}
        pace.observe(step, 1.0 + sum(phases.values()), phases)
    left = pace.remaining()
    assert left is not None
    assert left.middle == pytest.approx(8 * 1.0 + 2 * 7.0)  # after step 15 and after the last


def test_steps_of_an_earlier_process_give_a_range_and_its_evaluations_their_length() -> None:
    pace = Pace(20, {"eval": 4}, ("eval",))
    lines = [{"step": n, "seconds": 2.0 + 5.0 * (n == 4), "seconds/eval": 5.0 * (n == 4)} for n in range(1, 11)]
    pace.recall([line if line["step"] == 4 else {k: line[k] for k in ("step", "seconds")} for line in lines])
    left = pace.remaining()
    assert left == pytest.approx((None, 10 * 2.0 / 1.5 + 15.0, 10 * 2.0 * 1.5 + 15.0))
    pace.observe(11, 30.0, {})  # another machine, and cold
    left = pace.remaining()
    assert left is not None
    assert left.low < 9 * 30.0 + 10.0 < left.high


def test_a_clock_tells_its_watcher_where_a_phase_begins_and_ends_even_where_it_fails() -> None:
    told: list[tuple[str, bool]] = []
    clock = Clock(lambda name, begins: told.append((name, begins)))
    with clock("sample"):
        pass
    with pytest.raises(KeyError), clock("reward"):
        raise KeyError
    assert told == [("sample", True), ("sample", False), ("reward", True), ("reward", False)]


def test_the_screen_shows_every_number_of_the_step_and_where_its_time_went() -> None:
    text = screen(board_of(*({**VALUES, "step": n, "reward": 0.1 * n} for n in range(1, 5))))
    assert "step 4/40" in text
    assert "left 1:48 min (1:12 to 2:42 min)" in text  # 36 steps of 3 s
    for wanted in ("0.400", "▁▃▆█", "0.0123 nats/token", "7.5 tokens", "25% of groups", "memory 812 MB"):
        assert wanted in text, wanted
    assert re.search(r"sampling +\S+ 1 s, 33%  5,000 tokens/s", text)
    assert re.search(r"training +\S+ 2 s, 67%", text)


def test_a_phase_of_a_long_step_shows_how_far_it_is_and_how_fast() -> None:
    board = board_of(VALUES)
    board.running = RunningPhase("sample", began=4.0, tokens=1200, done=6, total=16)
    assert "6 s  6 of 16  200 tokens/s" in screen(board, now=10.0)


def test_signal_to_noise_is_the_ratio_of_the_means_times_the_groups() -> None:
    measured = [(0.5, 4.0), (-0.1, 6.0), (0.2, 2.0)]
    board = board_of(
        *({**VALUES, "step": n, "gradient_signal": s, "gradient_noise": v} for n, (s, v) in enumerate(measured, 1))
    )
    expected = fmean([s for s, _ in measured]) * PLAN.groups / fmean([v for _, v in measured])
    assert board.signal_to_noise() == pytest.approx(expected)
    assert f"signal to noise of a step's gradient {expected:.2f}" in screen(board)


def test_the_screen_never_grows_over_the_height_of_the_terminal() -> None:
    board = board_of(VALUES)
    board.sample, board.sampled_at = ROW, (3, 0.0)
    assert "completion  2" in screen(board)
    for height in (4, 10, 18):
        assert len(screen(board, height=height).rstrip("\n").splitlines()) <= height


def test_hooks_inside_a_phase_move_its_bar() -> None:
    live = LiveTerminal(console=Console(file=io.StringIO()), now=lambda: 0.0)
    live.begin(PLAN)
    live.phase("sample", True)
    live.sampled(16, 3)
    live.sampled(13, 1)
    assert live.board is not None
    going = live.board.running
    assert going is not None
    assert (going.tokens, going.done, going.total) == (29, 4, 16)
    live.phase("sample", False)
    assert live.board.running is None


def test_characters_that_steer_a_terminal_are_shown_by_number() -> None:
    assert harmless("a\x1b[31m\u202eb\nc") == "a⟨U+001B⟩[31m⟨U+202E⟩b↵c"
    assert sample_lines(ROW, 80)[2] == "reward      1.5 = right 1, form 0.5"


def plain_run(terminal: Terminal) -> None:
    terminal.begin(PLAN)
    terminal.say("[begin]")
    for step in range(1, 41):
        terminal.step({**VALUES, "step": step}, 3.0)
        terminal.sample(step, [ROW])
    terminal.finding(FINDING)
    share = Interval(0.5, 0.4, 0.6)
    examples = [{"prompt": "\x1b[2Jp", "completion": "\x07c", "passed": True}]
    result = Evaluation(4, share, None, {}, 3.0, 0, examples)
    terminal.evaluation("After", result)
    terminal.summary({"seconds_by_phase": {"sample": 1.0}, "seconds_total": 1.0}, result, result, ["Model: [x]"])


def test_plain_lines_hold_no_control_character() -> None:
    out = io.StringIO()
    plain_run(Terminal(console=Console(file=out, highlight=False, soft_wrap=True)))
    text = out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert text.count("· step ") == 40
    assert "left 29 s to 2:56 min" in text  # after 1 of 40 steps of 3 s
    assert "left 1:24 min\n" in text  # after 12
    assert "[begin]" in text
    for wanted in ("the cause", "the evidence", "the change", "completion  2⟨U+001B⟩", "Model: [x]"):
        assert wanted in text, wanted


def test_quiet_keeps_findings_warnings_and_the_table() -> None:
    out = io.StringIO()
    plain_run(Terminal(quiet=True, console=Console(file=out, highlight=False, soft_wrap=True)))
    text = out.getvalue()
    assert "· step" not in text
    assert "[begin]" not in text
    assert "the cause" in text
    assert "before and after" in text


def test_a_pipe_gets_plain_lines_and_a_dumb_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert type(make_terminal()) is Terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert type(make_terminal()) is LiveTerminal
    assert type(make_terminal(quiet=True)) is Terminal
    assert type(make_terminal(as_json=True)) is JsonTerminal
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_terminal()) is Terminal


def first_digit(completion: str, answer: str, **row: Any) -> float:
    return float(completion[:1] == answer)


@pytest.fixture
def train(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(terminal: Terminal, name: str = "r", **changes: Any) -> Any:
        settings = {"max_steps": 6, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 4}
        settings |= {"num_eval_prompts": 4, "eval_num_samples": 0, "learning_rate": 1e-2, "use_cpu": True}
        settings |= {"reward_in_process": True, "run_name": name, "engine": "native", "logging_steps": 5}
        trainer = GRPOTrainer(
            model=make_model("llama"),
            reward_funcs=first_digit,
            args=GRPOConfig(str(tmp_path), **{**settings, **changes}),
            train_dataset=ROWS,
            processing_class=tokenizer,
            terminal=terminal,
        )
        trainer.train()
        return trainer

    return run


def test_json_lines_are_those_of_the_metrics_file_and_nothing_else(train: Callable[..., Any]) -> None:
    out, people = io.StringIO(), io.StringIO()
    trainer = train(JsonTerminal(out=out, console=Console(file=people)))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines == read_metrics(trainer.folder.metrics)
    assert len(lines) == 6
    assert "before and after" in people.getvalue()


def test_a_live_run_is_the_plain_run_number_for_number(train: Callable[..., Any]) -> None:
    """Screen, hooks and findings change nothing: the same weights to the last bit."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=90, height=40)
    live = train(LiveTerminal(console=console), "live")
    plain = train(Terminal(quiet=True, console=Console(file=io.StringIO())), "plain")
    for one, other in zip(live.model.parameters(), plain.model.parameters(), strict=True):
        assert (one == other).all()
    text = out.getvalue()
    assert "step 6/6" in text
    assert "sampling" in text
    assert live.context.terminal.board.history["reward"][-1][0] == 6
