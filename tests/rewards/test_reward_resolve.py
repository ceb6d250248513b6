"""From a spec to a function that a worker finds (fault row W8)."""

import json
import os
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from llm_pg.config import ConfigError, load_config
from llm_pg.rewards import Scorer, resolve, resolve_all, specs
from llm_pg.rewards.loading import has_main_guard, target_of
from llm_pg.run.before.preflight import check_inputs
from reward_fns.text import exact_match

SPECIMENS = str(Path(__file__).parent / "reward_specimens.py")


def at_module_level(completion):
    return 7.0


def test_every_way_of_naming_a_function_finds_the_same_one():
    by_object, by_name = resolve(exact_match), resolve("exact_match")
    by_module = resolve("reward_fns.text:exact_match")
    by_file = resolve(f"{Path(exact_match.__code__.co_filename)}:exact_match")
    assert by_object.signature == by_name.signature == by_module.signature == by_file.signature
    assert {function.name for function in (by_object, by_name, by_module, by_file)} == {"exact_match"}
    assert by_object.target == by_name.target


def test_a_resolved_function_resolves_to_itself():
    function = resolve("exact_match")
    assert resolve(function) == function


@pytest.mark.faults
@pytest.mark.parametrize(
    "spec, words",
    [
        ("exact_mach", "no shipped reward function 'exact_mach'. Did you mean 'exact_match'"),
        ("nothing_like_it_at_all", "no shipped reward function 'nothing_like_it_at_all'. There are these shipped: "),
        (f"{SPECIMENS}:hang", "has no 'hang'. Did you mean 'hangs'"),
        (f"{SPECIMENS[:-4]}.py:hangs", "there is no file"),
        (f"{SPECIMENS.replace('specimens', 'specimen')}:hangs", "Did you mean 'reward_specimens.py'"),
        ("/no/such/folder/file.py:f", "there is no file /no/such/folder/file.py"),
        ("reward_fns.texts:exact_match", "no module 'reward_fns.texts'. Did you mean 'reward_fns.text'"),
        ("reward_fn.text:exact_match", "no module 'reward_fn'. Did you mean 'reward_fns'"),
        ("reward_fns.text:exact_mach", "has no 'exact_mach'. Did you mean 'exact_match'"),
        (f"{SPECIMENS}:not_a_function", "'not_a_function' is a int, not a function"),
        (f"{SPECIMENS}:wrong_names", "wrong_names takes (text, label), which is neither form"),
        (":f", "is written 'module:function'"),
        ("json:", "is written 'module:function'"),
        ("a b:c d", "is written 'module:function'"),
    ],
)
def test_a_wrong_path_name_or_signature_is_an_error_within_a_second_with_near_names(spec, words):
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        resolve(spec)
    seconds = time.monotonic() - start
    assert words in str(caught.value)
    assert seconds < 1.0


@pytest.mark.faults
def test_a_missing_column_is_named_with_those_present():
    function = resolve(f"{SPECIMENS}:needs_columns")
    function.check_columns(["prompt", "answer"])
    with pytest.raises(ValueError, match=r"needs the column 'answer'.*Present: prompt, answers\. Is it 'answers'\?"):
        function.check_columns(["prompt", "answers"])


def test_a_fixed_argument_stands_for_its_column():
    resolve({"function": f"{SPECIMENS}:needs_columns", "answer": "x"}).check_columns(["prompt"])


def test_arguments_of_every_call_are_no_columns():
    resolve(f"{SPECIMENS}:plain_with_everything").check_columns([])
    resolve(f"{SPECIMENS}:trl_form").check_columns(["answer"])


def test_an_unknown_fixed_argument_gets_a_near_name():
    with pytest.raises(ValueError, match=r"has no parameter 'tolerence'. Did you mean 'tolerance'"):
        resolve({"function": f"{SPECIMENS}:needs_columns", "tolerence": 1})


def test_a_mapping_without_the_function_is_refused():
    with pytest.raises(ValueError, match="needs the key 'function'; got name, weight"):
        resolve({"name": "exact_match", "weight": 2})


def test_a_partial_with_positional_arguments_is_refused():
    with pytest.raises(ValueError, match="fixes arguments by position"):
        resolve(partial(exact_match, "x"))


def test_a_module_that_raises_shows_its_own_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match=r"(?s)its module raised.*broken.py.*No module named 'nothing_of_that_name'"):
        resolve(f"{tmp_path}/broken.py:f")


@pytest.mark.faults
def test_a_module_that_ends_its_process_is_reported(tmp_path):
    (tmp_path / "deadly.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(ValueError, match=r"were lost before they began \(exit code 5\)"):
        resolve(f"{tmp_path}/deadly.py:f")


def test_a_file_finds_its_neighbours_and_runs_outside_this_process(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 4.0\n")
    (tmp_path / "mine.py").write_text(
        "import os\nfrom neighbour_of_mine import VALUE\n\n"
        "def f(completion, trainer):\n    return VALUE if os.getpid() != trainer else 0.0\n"
    )
    with Scorer([f"{tmp_path}/mine.py:f"]) as scorer:
        assert scorer.grade(["p"], ["c"], [[1]], [{"trainer": os.getpid()}]).reward == [4.0]
    assert "neighbour_of_mine" not in sys.modules


def test_a_module_beside_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def f(completion):\n    return 6.0\n")
    monkeypatch.chdir(tmp_path)
    with Scorer(["my_own_rewards:f"]) as scorer:
        assert scorer.grade(["p"], ["c"], [[1]], [{}]).reward == [6.0]


def test_a_function_of_a_module_goes_to_a_worker():
    function = resolve(at_module_level)
    assert function.target is not None
    assert function.target.qualname == "at_module_level"
    with Scorer([function]) as scorer:
        assert scorer.grade(["p"], ["c"], [[1]], [{}]).reward == [7.0]


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: lambda completion: 1.0, "a lambda"),
        (lambda: _closure(), "inside another function"),
        (lambda: _Callable(), "a _Callable object"),
    ],
)
def test_what_no_worker_can_load_runs_here_with_one_warning(make, reason, caplog):
    with Scorer([make()]) as scorer:
        for _ in range(3):
            scores = scorer.grade(["p"], ["c"], [[1]], [{}])
    assert scores.reward == [1.0]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert reason in warnings[0]
    assert "without a deadline" in warnings[0]


def _closure():
    value = 1.0

    def inner(completion):
        return value

    return inner


class _Callable:
    def __call__(self, completion):
        return 1.0


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="got 3"):
        resolve(3)


def test_many_specs_are_read_by_one_worker():
    names = ["one", "length", "raises", "judge", "trl_form"]
    functions = resolve_all([f"{SPECIMENS}:{name}" for name in names])
    assert [function.name for function in functions] == names
    assert [function.signature.form for function in functions] == ["plain"] * 4 + ["batch"]
    assert functions[3].signature.is_async


SCRIPT = """
import os, sys
from llm_pg.config import ConfigError, load_config
from llm_pg.rewards import Scorer

def mine(completion, trainer):
    return float(os.getpid() != trainer)

{guard}
    with Scorer([mine]) as scorer:
        print("SCORES", scorer.grade(["p"], ["c"], [[1]], [{{"trainer": os.getpid()}}]).reward)
"""


@pytest.mark.parametrize("guard, reward", [('if __name__ == "__main__":', 1.0), ("if True:", 0.0)])
def test_a_function_of_a_script_goes_to_a_worker_only_when_the_main_part_is_guarded(tmp_path, guard, reward):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard=guard))
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout.split("\n").count(f"SCORES [{reward}]") == 1, done.stderr
    assert ("has no `if __name__" in done.stderr) == (reward == 0.0)


def test_the_guard_is_found_in_the_syntax_and_not_in_the_text(tmp_path):
    guarded, comment = tmp_path / "a.py", tmp_path / "b.py"
    guarded.write_text("def f():\n    pass\nif '__main__' == __name__:\n    f()\n")
    comment.write_text("# if __name__ == '__main__':\nf = 1\n")
    assert has_main_guard(guarded)
    assert not has_main_guard(comment)


def test_a_function_that_was_replaced_under_its_name_is_not_sent_by_name():
    def impostor(completion):
        return 1.0

    impostor.__qualname__ = "at_module_level"
    assert target_of(impostor) == f"{__name__}.at_module_level is not this object"


def test_importing_costs_under_a_tenth_of_a_second_and_no_torch():
    code = textwrap.dedent(
        """
        import sys, time
        start = time.process_time()
        from llm_pg.rewards import Scorer, resolve
        import reward_fns.registry
        seconds = time.process_time() - start
        print(seconds, sorted({"torch", "numpy", "transformers", "datasets", "sympy", "jsonschema"} & set(sys.modules)))
        """
    )
    root = Path(__file__).parents[2]
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root) for _ in range(3)]
    seconds, heavy = zip(*(run.stdout.split(" ", 1) for run in runs), strict=True)
    assert set(heavy) == {"[]\n"}
    assert min(map(float, seconds)) < 0.1


@pytest.mark.faults
def test_rows_that_a_function_cannot_grade_are_named_before_a_run(tmp_path):
    """A gold answer that is no single number, at `check`, by the line of the file."""
    answers = ["3", "3 or 4", "1/2", "x + 1", "n/a"]
    lines = [json.dumps({"prompt": f"p{place}", "answer": answer}) for place, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    text = f"model: {{make: {{model_type: llama}}}}\ndata: {{data_files: {tmp_path}/rows.jsonl, num_eval_prompts: 0}}\n"
    (tmp_path / "run.yaml").write_text(
        f"{text}reward: {{reward_funcs: [number_match]}}\ntrain: {{prompts_per_step: 2}}\n"
    )
    with pytest.raises(ConfigError) as raised:
        check_inputs(load_config(tmp_path / "run.yaml", []))
    assert "number_match cannot grade 3 of 5 rows. The first is " in str(raised.value)
    assert (
        "row 1 of rows.jsonl (line 2): number_match needs one number in the column 'answer', and got '3 or 4'"
        in str(raised.value)
    )
    assert "row 3 of rows.jsonl (line 4)" in str(raised.value)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[::2][:2]))
    check_inputs(load_config(tmp_path / "run.yaml", []))


def test_a_file_is_read_in_a_worker_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []
    original = specs.WorkerPool
    monkeypatch.setattr(specs, "WorkerPool", lambda *given, **named: starts.append(1) or original(*given, **named))
    file = tmp_path / "mine.py"
    file.write_text("def score(completion, answer):\n    return 1.0\n")
    first, again = (resolve(f"{file}:score") for _ in range(2))
    assert first == again
    assert (first.signature.required, len(starts)) == (("answer",), 1)
    file.write_text("def score(completion, gold, bonus=0):\n    return 1.0\n")
    changed = resolve(f"{file}:score")
    assert (changed.signature.required, changed.signature.optional, len(starts)) == (("gold",), ("bonus",), 2)
    file.unlink()
    with pytest.raises(ValueError, match=r"mine\.py"):
        resolve(f"{file}:score")


def test_a_function_that_a_script_defines_under_its_main_guard_is_run_in_the_trainer(tmp_path: Path) -> None:
    """As TRL's examples define theirs: the file, loaded again under another name, does not have it."""
    script = tmp_path / "script.py"
    script.write_text(
        'def outside(completions, **_):\n    return [1.0 for _ in completions]\n\nif __name__ == "__main__":\n'
        "    from llm_pg.rewards import Scorer\n\n"
        "    def inside(completions, **_):\n        return [2.0 for _ in completions]\n\n"
        "    with Scorer([outside, inside]) as scorer:\n"
        "        print(scorer.grade(['a'], ['b'], [[1]], [{}]).reward, [f.target is None for f in scorer.functions])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[3.0] [False, True]", done.stderr[-2000:]
