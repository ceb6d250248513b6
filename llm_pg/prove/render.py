"""The table as text for a terminal, as markdown for docs/estimators.md, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .measure import BIASED, DIRECTION, EXACT, NOTHING, TOLERANCE, Line

HEAD = (
    "Expected update of one step against the gradient of the objective, over every batch that could be sampled\n"
    "(two prompts, 7 or 15 completions each, float64). cosine and scale: of E[update] with the gradient; bias: their\n"
    "distance / length of the gradient; variance: trace of the covariance at equal scale, plain REINFORCE = 1."
)
COLUMNS = ("algorithm", "baseline", "reduction", "detail", "cosine", "scale", "bias", "variance", "verdict")
_WIDTHS = (18, 13, 12, 36, 7, 7, 8, 8, 0)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def cells(line: Line) -> tuple[str, ...]:
    """One line's texts, in the order of COLUMNS."""
    error = f" ± {line.standard_error:.2g}" if line.standard_error else ""
    bias = "0" if line.bias < TOLERANCE else f"{line.bias:.3f}" + error
    return (
        line.algorithm,
        line.baseline,
        line.reduction,
        line.detail,
        _number(line.cosine, 4),
        _number(line.scale, 3),
        bias,
        _number(line.variance_ratio, 2),
        line.verdict,
    )


def _sections(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    out: list[tuple[str, list[Line]]] = []
    for line in lines:
        if not out or out[-1][0] != line.section:
            out.append((line.section, []))
        out[-1][1].append(line)
    return out


def _title(name: str, lines: Sequence[Line]) -> str:
    groups = sorted({line.num_generations for line in lines})
    batches = sorted({line.batches for line in lines})
    text = f"{batches[0]:,}" if len(batches) == 1 else f"{batches[0]:,} to {batches[-1]:,}"
    return f"{name} (G = {', '.join(map(str, groups))}; {text} batches)"


def legend(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Each reason named in the lines, with its sentence, in the order of appearance."""
    found: dict[str, str] = {}
    for line in lines:
        for keyword, sentence in line.reasons:
            found.setdefault(keyword, sentence)
    return list(found.items())


def summary(lines: Sequence[Line]) -> str:
    counts = {kind: sum(line.kind == kind for line in lines) for kind in (EXACT, DIRECTION, BIASED, NOTHING)}
    return f"{len(lines)} lines: " + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)


def text(lines: Sequence[Line]) -> str:
    def spec(values: Sequence[str]) -> str:
        padded = [
            value.rjust(width) if 4 <= i <= 7 else value.ljust(width)
            for i, (value, width) in enumerate(zip(values, _WIDTHS, strict=True))
        ]
        return "  " + " ".join(padded).rstrip()

    out = [HEAD, "", spec(COLUMNS)]
    for name, members in _sections(lines):
        out += ["", _title(name, members), *(spec(cells(line)) for line in members)]
    out += ["", summary(lines), ""]
    out += [f"  {keyword}: {sentence}" for keyword, sentence in legend(lines)]
    return "\n".join(out)


def _markdown_table(lines: Sequence[Line]) -> list[str]:
    out = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|--:|--:|--:|--:|---|"]
    for name, members in _sections(lines):
        out.append(f"| **{_title(name, members)}** |" + " |" * (len(COLUMNS) - 1))
        out += ["| " + " | ".join(cells(line)) + " |" for line in members]
    return out


def markdown(lines: Sequence[Line], short: Sequence[Line]) -> str:
    """The short table, then the other lines and the reasons folded away."""
    rest = [line for line in lines if line not in short]
    out = [HEAD.replace("\n", " "), "", *_markdown_table(short), ""]
    if rest:
        out += ["<details>", f"<summary>The other {len(rest)} lines</summary>", ""]
        out += [*_markdown_table(rest), "", "</details>", ""]
    out += ["<details>", "<summary>What the reasons mean</summary>", ""]
    out += [f"* *{keyword}*: {sentence}" for keyword, sentence in legend(lines)]
    return "\n".join([*out, "", "</details>"])


def as_json(lines: Sequence[Line]) -> str:
    return json.dumps([line.as_dict() for line in lines], indent=1, allow_nan=False)
