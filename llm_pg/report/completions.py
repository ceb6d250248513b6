"""Completions for the browser of the page: as many steps as its size allows, spread evenly over the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..doctor.evidence import Run, json_lines, prompt_of

BUDGET = 1_900_000  # bytes of completions in the page, all runs together
LONGEST_TEXT = 20_000  # characters
MOST_TOKENS = 4_000
EXPECTED = ("answer", "ground_truth", "solution", "target", "expected", "label", "reference")  # shown first
SCALE = 1000  # numbers of tokens are kept as whole thousandths


class Shared:
    """Texts that many rows share, kept once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.length = 0  # characters
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(text)
            self.length += len(text)
        return self._places[text]

    def size(self) -> int:
        return len(encoded(self.texts))


def encoded(value: Any) -> bytes:
    """Compact JSON; half of a surrogate pair, which no file can hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def spread(count: int) -> Iterator[int]:
    """0 .. count-1: the last, the first, then ever finer halves, so that any beginning is spread evenly."""
    seen: set[int] = set()
    cuts = 1
    while len(seen) < count:
        for k in range(cuts, -1, -1):
            place = round(k * (count - 1) / cuts)
            if place not in seen:
                seen.add(place)
                yield place
        cuts *= 2


def _thousandths(values: Sequence[float | None]) -> Any:
    """Whole thousandths, and one number where all are the same; None where there is none that JSON could hold."""
    whole = [None if v is None or not math.isfinite(v) else round(v * SCALE) for v in values]
    return whole[0] if whole and all(v == whole[0] for v in whole) else whole


def shortened(text: str) -> str:
    """The beginning and the end of a text that is too long for the page."""
    half = LONGEST_TEXT // 2
    return text if len(text) <= LONGEST_TEXT else f"{text[:half]} … {text[-half:]}"


def columns(row: dict[str, Any]) -> str:
    """The columns of the row's prompt as JSON, the expected answer first."""
    given = row.get("columns") or {}
    first = [name for name in EXPECTED if name in given]
    return encoded({name: given[name] for name in [*first, *(n for n in given if n not in first)]}).decode("utf-8")


def cleaned(row: dict[str, Any], clean: Callable[[str], str]) -> dict[str, Any]:
    """Returns the row with its secrets hidden; a completion that holds one has no tokens, which would spell it."""
    columns = {name: clean(v) if isinstance(v, str) else v for name, v in (row.get("columns") or {}).items()}
    out = {**row, "prompt": clean(prompt_of(row)), "messages": None, "columns": columns}
    text = str(row.get("completion", ""))
    return out if clean(text) == text else {**out, "completion": clean(text), "pieces": None}


def compact(row: dict[str, Any], run: int, step: int, prompts: Shared, pieces: Shared, shown: Shared) -> dict[str, Any]:
    """A row of completions/ for the page. Long ones are cut, with what they were."""
    text, tokens = str(row.get("completion", "")), row.get("tokens") or {}
    parts = row.get("pieces")
    out: dict[str, Any] = {
        "r": run,
        "s": step,
        "g": row.get("group", 0),
        "p": prompts.place(shortened(prompt_of(row))),
        "d": shown.place(columns(row)),
        "w": row.get("reward"),
        "c": list((row.get("parts") or {}).values()),
        "n": len(tokens.get("logp") or row.get("ids") or []),
    }
    if row.get("truncated"):
        out["x"] = 1
    if parts and len(parts) == out["n"] and sum(map(len, parts[:MOST_TOKENS])) <= 4 * LONGEST_TEXT:
        out["t"] = [pieces.place(part) for part in parts[:MOST_TOKENS]]
    else:
        out["text"] = shortened(text)
    if len(text) > LONGEST_TEXT or out["n"] > MOST_TOKENS:
        out["cut"] = len(text)
    if "t" in out:
        logp = tokens.get("logp", [])[:MOST_TOKENS]
        out["l"] = _thousandths(logp)
        out["a"] = _thousandths(tokens.get("weight", [])[:MOST_TOKENS])
        for short, name in (("e", "entropy"), ("q", "ratio")):
            if tokens.get(name):
                out[short] = _thousandths(tokens[name][:MOST_TOKENS])
        for short, name in (("k", "ref_logp"), ("m", "teacher_logp")):
            if tokens.get(name):
                pairs = zip(logp, tokens[name], strict=False)
                out[short] = _thousandths([None if a is None or b is None else a - b for a, b in pairs])
    return out


def gather(runs: Sequence[Run], budget: int = BUDGET, clean: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Rows, the texts that they share, and how many steps of each run are in the page.

    clean: hides the secrets in a text.
    """
    prompts, pieces, shown = Shared(), Shared(), Shared()
    rows: list[dict[str, Any]] = []
    kept, there, parts = [], [], []
    used = 0
    for place, run in enumerate(runs):
        files = run.completions()
        until = budget * (place + 1) // len(runs)
        names: list[str] = []
        steps = 0
        for k in spread(len(files)):
            if used >= until and steps:
                break
            step, path = files[k]
            room = max(until - used, budget // 20)
            for row in (row if clean is None else cleaned(row, clean) for row in json_lines(path)):
                names = list((row.get("parts") or {}).keys()) or names
                before = sum(text.length for text in (prompts, pieces, shown))
                small = compact(row, place, step, prompts, pieces, shown)
                size = len(encoded(small)) + 1
                size += 4 * (sum(text.length for text in (prompts, pieces, shown)) - before)
                rows.append(small)
                used, room = used + size, room - size
                if room <= 0:
                    break
            steps += 1
        kept.append(steps)
        there.append(len(files))
        parts.append(names)
    rows.sort(key=lambda row: (row["r"], row["s"], row["g"]))
    return {
        "rows": rows,
        "prompts": prompts.texts,
        "pieces": pieces.texts,
        "columns": shown.texts,
        "parts": parts,
        "steps_shown": kept,
        "steps_there": there,
        "scale": SCALE,
    }
