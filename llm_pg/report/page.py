"""The page: one file, no network. Its content policy holds the hashes of its script and style; nothing else runs."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateError
from markupsafe import Markup, escape

from .. import __version__
from ..config.schema import Config
from ..doctor.evidence import Run, read_run
from ..doctor.finding import by_gravity
from ..doctor.live import examine
from ..evaluate import unreached
from ..metrics import METRICS
from .charts import charts, clocks
from .completions import encoded, gather
from .pairs import pair, side_by_side
from .svg import hover_data, number, svg

ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
PLACES = {("run", "output_dir"), ("run", "run_name"), ("run", "overwrite")}


@dataclass(frozen=True)
class Live:
    """Of a page about a run that goes on.

    Attributes:
        when: where the run was when the page was written, such as "after step 7".
        written: at this time, in seconds since 1970.
        seconds: until it is written again; the page then loads itself again, unless somebody uses it.
        begun: names the starts of the runs, where a server sends what is new (`llm-pg watch`) and the page asks it
            instead; None = the page is a file.
        version: of what is in the page, where it is served.
    """

    when: str
    written: float
    seconds: float
    begun: str | None = None
    version: int = 0

    @property
    def clock(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.written))


def write_report(paths: Sequence[str | Path], out: str | Path | None = None, live: Live | None = None) -> Path:
    """Write the page about the runs in these folders; by default `report.html` in the first one.

    live: where the run goes on.

    Raises ConfigError where a folder holds no run.
    """
    runs = [read_run(path) for path in paths]
    place = Path(out) if out is not None else runs[0].path / "report.html"
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    beside.write_bytes(render(runs, live).encode("utf-8", "replace"))
    beside.replace(place)
    return place


def leave_report(folder: Path, warn: Callable[[str], None], beside: Sequence[Path] = ()) -> list[str]:
    """The page of a run that ends, as a line that says where it is. A failure is a warning: the run is safe.

    beside: folders of runs that the page shows next to it.
    """
    try:
        return [f"Page:    {write_report([folder, *beside])}"]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, TemplateError) as error:
        warn(f"The page could not be written ({type(error).__name__}: {error}). Try `llm-pg report {folder}`.")
        return []


def render(
    runs: Sequence[Run],
    live: Live | None = None,
    *,
    completions: bool = True,
    clean: Callable[[str], str] | None = None,
) -> str:
    """The HTML of the page.

    Args:
        runs: in the order of their columns. live: where one of them goes on.
        completions: whether they are in it; without them the page is what changes with every step.
        clean: hides the secrets in a text that was sampled.
    """
    style, script = _asset("page.css"), "".join(map(_asset, ("charts.js", "live.js", "page.js")))
    panels = charts(runs)
    data = {**gather(runs if completions else [], clean=clean), "runs": [run.name for run in runs]}
    data |= {"charts": [hover_data(chart) for chart in panels], "clocks": clocks(runs)}
    connect = "; connect-src 'self'" if live is not None and live.begun is not None else ""
    return _template().render(
        runs=runs,
        panels=[(chart, Markup(svg(chart, place)), place) for place, chart in enumerate(panels)],
        findings=[(run, by_gravity(examine(run))) for run in runs],
        outcomes=[_outcome(run) for run in runs],
        differences=differences(runs),
        phases=[(run, _phases(run)) for run in runs],
        comparison=comparison([_outcome(run) for run in runs]) if len(runs) > 1 else [],
        against=[pair(_examples(runs[0].after), _examples(run.after)) for run in runs[1:]],
        pairs=[pair(_examples(run.before), _examples(run.after)) for run in runs],
        beside=side_by_side([_examples(run.after) for run in runs]),
        provenance=[(run, [_session(facts) for facts in run.sessions]) for run in runs if run.sessions],
        glossary=METRICS,
        data=Markup(_in_script(data)),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:{connect}",
        version=__version__,
        live=live,
        title=", ".join(run.name for run in runs),
    )


@functools.cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["points"] = lambda share: f"{100 * share:.1f} points"
    environment.filters["number"] = number
    environment.filters["linked"] = linked
    return environment.from_string(_asset("page.html.j2"))


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _in_script(data: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    text = encoded(data).decode("utf-8")
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def visible(text: Any) -> str:
    """Text with control and direction characters by their numbers, so that they cannot disturb the page."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn"}
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in hidden else f"⟨U+{ord(c):04X}⟩" for c in str(text)
    )


def linked(text: str) -> Markup:
    """Text whose arXiv ids are links; nothing is asked for before somebody follows one."""
    return Markup(ARXIV.sub(r'<a href="https://arxiv.org/abs/\1" rel="noreferrer">arXiv \1</a>', str(escape(text))))


def _outcome(run: Run) -> dict[str, Any]:
    """Before and after as rows of (what, before, after), each a (mean, low, high) or None: shares, and rewards."""
    summary, before = run.summary, run.before
    after_at = summary.get("pass_at") or {}
    rows = [
        ("greedy", _triple(before.get("greedy")), _triple(summary.get("pass_rate_after_interval"))),
        ("sampled", _triple(before.get("sampled")), _triple(summary.get("sampled_after"))),
    ]
    rows += [(name, _triple(before.get(name)), _triple(summary.get(f"{name}_after"))) for name in ("strict", "lenient")]
    rows += [
        (f"pass@{k}", _triple((before.get("pass_at") or {}).get(k)), _triple(after_at.get(k)))
        for k in sorted({*after_at, *(before.get("pass_at") or {})}, key=int)
    ]
    rewards = [
        (f"mean reward, {label}", _triple(before.get(name)), _triple(summary.get(f"{name}_after")))
        for name, label in (("reward", "greedy"), ("sampled_reward", "sampled"))
    ]
    scores = [before.get("highest"), summary.get("highest_score_after"), *run.values("eval/highest_score")]
    highest = max((score for score in scores if score is not None), default=None)
    seconds = summary.get("seconds_total") or sum(run.values("seconds"))
    return {
        "rows": [row for row in rows if row[1] or row[2]],
        "rewards": [row for row in rewards if row[1] or row[2]],
        "unreached": unreached(float(run.setting("eval", "pass_threshold", 1.0)), highest),
        "done": run.done,
        "ended": bool(summary),
        "early": "" if summary else str(run.ended.get("how") or ""),
        "prompts": summary.get("num_eval_prompts") or before.get("num_prompts") or 0,
        "minutes": seconds / 60,
        "reward": next(reversed(run.values("reward") or run.values("return_mean")), None),
        "algorithm": run.setting("algorithm", "name", "?"),
        "model": run.subject,
    }


def comparison(outcomes: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[tuple[Any, float | None]]]]:
    """After training, of several runs beside one another: what, how it is written, and for each run the value and its
    difference from the first run's; None where one of them has none."""
    rows: list[tuple[str, str, list[tuple[Any, float | None]]]] = []
    for kind, form in (("rows", "percent"), ("rewards", "number")):
        of_runs = [{what: after for what, _, after in outcome[kind]} for outcome in outcomes]
        for what in dict.fromkeys(name for found in of_runs for name in found):
            values = [found.get(what) for found in of_runs]
            first = values[0]
            differences = [None if v is None or first is None else v[0] - first[0] for v in values]
            rows.append((what, form, list(zip(values, differences, strict=True))))
    for what, name in (("steps", "done"), ("minutes", "minutes")):
        found = [(float(outcome[name]), None, None) for outcome in outcomes]
        rows.append((what, "number", [(value, value[0] - found[0][0]) for value in found]))
    return rows


def _examples(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    return [example for example in evaluation.get("examples") or [] if isinstance(example, dict)]


def _session(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """One start of a run, as names and texts."""
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    shown = {**facts, "versions": versions}
    order = ("began", "command", "commit", "host", "device", "ranks", "platform", "versions")
    return [(name, str(shown[name])) for name in order if shown.get(name)]


def _triple(value: Any) -> tuple[float, float | None, float | None] | None:
    """Mean and interval from the forms in which before.json and summary.json hold them."""
    if value is None:
        return None
    if isinstance(value, dict):
        return value["mean"], value["low"], value["high"]
    if isinstance(value, (list, tuple)):
        return value[0], value[1], value[2]
    return float(value), None, None


def _phases(run: Run) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of all), the longest first."""
    seconds = run.summary.get("seconds_by_phase") or {}
    if not seconds:
        names = {name for m in run.metrics for name in m if name.startswith("seconds/")}
        seconds = {name.removeprefix("seconds/"): sum(run.values(name)) for name in names}
    total = sum(seconds.values()) or 1.0
    return sorted(((name, s, s / total) for name, s in seconds.items()), key=lambda row: -row[1])


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which runs differ; for a single run, from the defaults (the default is then the first column)."""
    if len(runs) > 1:
        columns = [run.config for run in runs]
    else:
        columns = [Config().model_dump(mode="json"), runs[0].config]
    sections = dict.fromkeys(s for run in runs for s in run.config if isinstance(run.config[s], dict))
    keys = dict.fromkeys((s, leaf) for c in columns for s in sections for leaf in c.get(s) or {})
    rows = []
    for section, leaf in keys:
        values = [(c.get(section) or {}).get(leaf) for c in columns]
        if (section, leaf) not in PLACES and any(value != values[0] for value in values):
            rows.append((f"{section}.{leaf}", ["–" if value is None else str(value) for value in values]))
    return rows
