"""Tasks of reasoning-gym (extra `gym`), scored by the library's own scorers, in the reward workers.

Not every scorer can be trusted with what a model writes. `EXECUTES` lists those that hand the answer to `eval` or to a
parser that does; `BROKEN` those that do not give their own answer full marks, or pay half of them to who knows nothing.
Both are refused. `GOOD` is the rest, as tried with version 0.1.25 (`tests/reward_fns/test_reasoning_gym.py` tries it
again): the gold answer earns 1, junk less than 0.5. A task on no list is refused too, until somebody has looked at it.
"""

import json
import re
from functools import lru_cache
from importlib import import_module
from typing import Any

from reward_fns.registry import Gold, reward

REWARD = "reasoning_gym"
REQUIRES = ("reasoning_gym",)
SUFFIX = "\nGive the final answer between <answer> and </answer>."
LONGEST_ANSWER = 10_000  # characters; longer ones earn 0 unread
DRAWS = 10  # entries drawn for each one wanted, before a task counts as used up

EXECUTES = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), "eval"),
    **dict.fromkeys(
        (
            "countdown",
            "intermediate_integration",
            "polynomial_multiplication",
            "puzzle24",
            "simple_integration",
        ),
        "sympy's parse_expr",
    ),
}
_HALF = "a constant answer earns half of the reward or more"
_NO_GOLD = "its entries have no answer of their own that could be tried"
_NOT_JSON = "its entries do not survive JSON, in which rows reach a worker: the gold answer then earns 0.05"
_NOT_SEEDED = "its entries are not a function of the seed, so that a run could not go on with the same data"
BROKEN = {
    **dict.fromkeys(("circuit_logic", "coin_flip", "course_schedule", "isomorphic_strings", "ransom_note"), _HALF),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_GOLD),
    **dict.fromkeys(("arc_agi", "rearc"), _NOT_JSON),
    **dict.fromkeys(("codeio", "knight_swap", "word_ladder"), _NOT_SEEDED),
    "composite": "it is a mixture of others; take them by name",
    "game_of_life_halting": "any text at all earns the full reward where the answer is False",
    "knights_knaves": "the question itself, given back, earns 0.65",
}
_TRIED = """
ab acre advanced_geometry aiw arc_1d base_conversion basic_arithmetic bf binary_alternation bitwise_arithmetic
caesar_cipher calendar_arithmetic chain_sum color_cube_rotation complex_arithmetic count_bits count_primes
cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font
fraction_simplification futoshiki game_of_life gcd group_anagrams gsm_symbolic jugs kakurasu largest_island lcm
leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku
modulo_grid needle_haystack number_filtering number_format number_sequence number_sorting palindrome_generation
palindrome_partitioning path_star polynomial_equations pool_matrix power_function prime_factorization products
quantum_lock rectangle_count rotate_matrix rotten_oranges self_reference sentence_reordering shortest_path
simple_equations simple_geometry sokoban spell_backward string_manipulation string_splitting string_synthesis
sudoku survo syllogism time_intervals tower_of_hanoi tsumego word_sequence_reversal word_sorting zebra_puzzles
"""
GOOD = frozenset(_TRIED.split())
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def entry_gold(gym_entry: str, **row: Any) -> Gold:
    """The answer of the entry, alone or in tags."""
    return Gold(str(json.loads(gym_entry)["answer"]), reads=frozenset({"alone", "tag"}))


@reward(
    low=0.0,
    high=1.0,
    floor=0.5,
    checks="answer",
    requires=REQUIRES,
    extra="gym",
    special_tokens=True,
    gold=entry_gold,
)
def reasoning_gym(completion: str, gym_task: str, gym_entry: str, gym_options: str = "{}", **row: Any) -> float:
    """The task's own score of the answer in the completion.

    The answer is the content of the last <answer>...</answer>, or the whole completion without tags. `gym_task`,
    `gym_entry` and `gym_options` are columns that `prompts` writes. An answer that makes the scorer raise earns 0.

    Range [0, 1]. Floor 0.5: many tasks pay a little for a wrong answer, or for one that holds the right one.
    """
    check_task(gym_task)
    answer = answer_of(completion)
    if len(answer) > LONGEST_ANSWER:
        return 0.0
    return score(gym_task, answer, json.loads(gym_entry), gym_options)


def answer_of(completion: str) -> str:
    """What is handed to the scorer."""
    found = _ANSWER.findall(completion)
    return (found[-1] if found else completion).strip()


def score(task: str, answer: str, entry: dict[str, Any], options: str = "{}") -> float:
    """The library's score, held to [0, 1]."""
    dataset = _dataset(task, options)
    try:
        value = float(dataset.score_answer(answer, entry))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return 0.0  # scorers assume a form of the answer; one that has another is wrong
    return min(max(value, 0.0), 1.0)


@lru_cache(maxsize=32)
def _dataset(task: str, options: str) -> Any:
    return import_module("reasoning_gym").create_dataset(task, seed=0, size=1, **json.loads(options))


def check_task(task: str) -> None:
    """ValueError for a task that is not on the list of the good ones."""
    if task in GOOD:
        return
    if task in EXECUTES:
        raise ValueError(f"reasoning-gym's {task} is not used: its scorer executes the answer ({EXECUTES[task]}).")
    if task in BROKEN:
        raise ValueError(f"reasoning-gym's {task} is not used: {BROKEN[task]}.")
    raise ValueError(
        f"reasoning-gym's task {task!r} is on none of our lists. Look at its score_answer and add it to "
        f"reward_fns.reasoning_gym.GOOD, or take one of {', '.join(sorted(GOOD))}."
    )


def prompts(
    seed: int, n: int, task: str = "chain_sum", options: dict[str, Any] | None = None, suffix: str = SUFFIX
) -> list[dict[str, Any]]:
    """`n` rows of a task with distinct questions: prompt, answer, and the columns that the scorer needs.

    task: a name of `GOOD`. options: fields of the task's config, for example {"max_terms": 3}. suffix: what is put
    behind the question.

    Raises ValueError for a task that is not good, and where it has fewer distinct questions.
    """
    check_task(task)
    drawn = import_module("reasoning_gym").create_dataset(task, seed=seed, size=max(DRAWS * n, 1), **(options or {}))
    rows: list[dict[str, Any]] = []
    asked: set[str] = set()
    for place in range(DRAWS * n):
        if len(rows) == n:
            break
        entry = drawn[place]
        if entry["question"] in asked:
            continue
        asked.add(entry["question"])
        rows.append(
            {
                "prompt": entry["question"] + suffix,
                "answer": str(entry["answer"]),
                "gym_task": task,
                "gym_entry": json.dumps(entry),
                "gym_options": json.dumps(options or {}),
            }
        )
    if len(rows) < n:
        raise ValueError(
            f"reasoning-gym's {task} gave {len(rows)} distinct questions in {DRAWS * n} draws, and {n} were asked for. "
            "Ask for fewer (num_train_prompts, num_eval_prompts), or widen its options."
        )
    return rows


def demonstrations(
    seed: int, n: int, task: str = "chain_sum", options: dict[str, Any] | None = None, suffix: str = SUFFIX
) -> list[dict[str, str]]:
    """The gold answer to each row of `prompts`, in tags."""
    return [
        {"prompt": row["prompt"], "completion": f"<answer>{row['answer']}</answer>"}
        for row in prompts(seed, n, task, options, suffix)
    ]
