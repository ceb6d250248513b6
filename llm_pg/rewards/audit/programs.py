"""Right and wrong programs of one row for an audit."""

from collections.abc import Iterator

from llm_pg.rewards.audit.dresses import DressedCase
from reward_fns.registry import Gold

LOOP = "loops for ever"
# Programs that end before they have answered anything: no test can be passed by one.
ANSWERLESS = ("raises", LOOP, "exits with code 0")
_FENCE = "```"


def wrong_bodies(first: str) -> dict[str, str]:
    """Bodies of a function that does not do what is asked, by what they do. first: the name of its first argument."""
    return {
        "returns None": "return None",
        "returns its first argument": f"return {first}",
        "raises": "raise RuntimeError",
        LOOP: "while True:\n    pass",
        "exits with code 0": "import sys\nsys.exit(0)",
    }


def cases(gold: Gold, other: Gold | None, *, loops: bool) -> Iterator[DressedCase]:
    """The completions of a row whose answer is a program.

    other: that of another row, whose program is wrong here. loops: also one that does not end, which costs its test's
    whole time.
    """
    if gold.text:
        yield DressedCase("in a fenced block", _fenced(gold.text), True)
        yield DressedCase("in a fenced block in a text", f"Here it is.\n{_fenced(gold.text)}\nIt works.", True)
        wrong = _fenced("def first_try():\n    return None")
        yield DressedCase("after thinking of another", f"<think>{wrong}</think>\n{_fenced(gold.text)}", True)
        yield DressedCase("without a fence", gold.text, True)
    for name, text in gold.more:
        yield DressedCase(name, text, True)
    for name, code in _wrong_programs(gold, other).items():
        if loops or name != LOOP:
            yield DressedCase(name, _fenced(code), False)
    yield DressedCase("nothing", "", False)
    yield DressedCase("no program", "I cannot do that.", False)


def _wrong_programs(gold: Gold, other: Gold | None) -> dict[str, str]:
    if gold.entry:
        head = f"def {gold.entry}(*args, **kwargs):\n"
        bodies = wrong_bodies("args[0] if args else None")
        found = {name: head + _indented(body) for name, body in bodies.items()}
    else:
        found = {
            "prints nothing": "pass",
            "prints what it reads": "import sys\nprint(sys.stdin.read(), end='')",
            "raises": "raise RuntimeError",
            LOOP: "while True:\n    pass",
            "exits with code 0": "import sys\nsys.exit(0)",
        }
    if other is not None and other.text and gold.entry.isidentifier() and other.entry.isidentifier():
        found["the program of the next problem"] = f"{other.text}\n\n{gold.entry} = {other.entry}"
    elif other is not None and other.text and not gold.entry and not other.entry:
        found["the program of the next problem"] = other.text
    return found


def _fenced(code: str) -> str:
    return f"{_FENCE}python\n{code.rstrip()}\n{_FENCE}"


def _indented(body: str) -> str:
    return "".join(f"    {line}\n" for line in body.split("\n"))
