"""Sort the letters of a short word: the smallest task that a character-level model learns in a minute on a CPU."""

import math
import random
from typing import Any

from reward_fns.registry import Gold, reward

REWARD = "sort_letters"
ALPHABET = "abcdefgh"


def sorted_gold(letters: str, **row: Any) -> Gold:
    """The letters in order, alone."""
    return Gold("".join(sorted(letters)), reads=frozenset({"alone"}))


@reward(low=0.0, high=1.0, floor=0.0, checks="answer", gold=sorted_gold)
def sort_letters(completion: str, letters: str, **row: Any) -> float:
    """1 when the completion is the letters in alphabetical order and nothing else; else 0.

    `letters` (a column) is the word; white space around the completion is ignored.

    Range {0, 1}. Floor 0 on the rows of `prompts`, none of which is sorted already, so that an echo earns nothing; a
    row whose letters are in order pays an echo in full.
    """
    if not isinstance(letters, str) or not letters:
        raise ValueError(f"sort_letters needs a word in the column 'letters', and got {letters!r}.")
    return float(completion.strip() == "".join(sorted(letters)))


def prompts(
    seed: int, n: int, min_length: int = 2, max_length: int = 5, alphabet: str = ALPHABET
) -> list[dict[str, Any]]:
    """`n` distinct rows with the columns prompt ("sort: cab="), letters ("cab") and answer ("abc").

    Lengths are drawn evenly from min_length to max_length; a length whose words are used up is left out. Words that
    are sorted already are never drawn. The rows are a function of the arguments, and shuffled at the end, so any cut
    into training and held-out rows is a fair one.

    Raises ValueError when fewer than `n` such words exist.
    """
    alphabet = "".join(sorted(set(alphabet)))
    if not 2 <= min_length <= max_length:
        raise ValueError(f"Lengths must satisfy 2 <= min_length <= max_length; got {min_length} and {max_length}.")
    left = {length: count_unsorted(length, len(alphabet)) for length in range(min_length, max_length + 1)}
    if n > sum(left.values()):
        raise ValueError(
            f"prompts was asked for {n} distinct words, and only {sum(left.values())} unsorted ones of {min_length} to "
            f"{max_length} letters from {alphabet!r} exist. Ask for fewer, or raise max_length or the alphabet."
        )
    rng = random.Random(f"sort_letters {seed}")
    words: set[str] = set()
    order: list[str] = []
    while len(order) < n:
        length = rng.choice([length for length, count in left.items() if count])
        word = "".join(rng.choices(alphabet, k=length))
        if word not in words and list(word) != sorted(word):
            words.add(word)
            order.append(word)
            left[length] -= 1
    rng.shuffle(order)
    return [{"prompt": f"sort: {word}=", "letters": word, "answer": "".join(sorted(word))} for word in order]


def demonstrations(
    seed: int,
    n: int,
    noise: float = 0.0,
    wrong: str = "shuffle",
    min_length: int = 2,
    max_length: int = 5,
    alphabet: str = ALPHABET,
) -> list[dict[str, str]]:
    """Rows with prompt and completion for a supervised warm start; row i answers row i of `prompts(seed, n)`.

    noise: the probability in [0, 1] that an answer is wrong. wrong: what such an answer is, "shuffle" (a random wrong
    order of the letters) or "backwards" (from last to first: a habit that the model takes on, so that its greedy answer
    is wrong where noise is above a half). A word of equal letters alone is never drawn, so backwards is always wrong.
    So to keep held-out prompts out of the warm start, ask for all rows with one `n` and cut both lists alike.
    """
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"noise is a probability from 0 to 1; got {noise}.")
    if wrong not in ("shuffle", "backwards"):
        raise ValueError(f"wrong is 'shuffle' or 'backwards'; got {wrong!r}.")
    rng = random.Random(f"sort_letters demonstrations {seed}")
    rows = []
    for row in prompts(seed, n, min_length, max_length, alphabet):
        completion = row["answer"]
        if rng.random() < noise:
            completion = row["answer"][::-1] if wrong == "backwards" else completion
            while completion == row["answer"]:
                completion = "".join(rng.sample(row["letters"], len(row["letters"])))
        rows.append({"prompt": row["prompt"], "completion": completion})
    return rows


def count_unsorted(length: int, num_letters: int) -> int:
    """How many words of `length` over an ordered alphabet are not in order: all words less the multisets."""
    return num_letters**length - math.comb(num_letters + length - 1, length) if num_letters else 0
