"""From what a user writes to a reward function that a worker can find: checked here, before any model is loaded."""

import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_pg.columns import usual_column
from llm_pg.processes.guard import can_stand
from llm_pg.rewards.contract import FORMS, RESERVED, Signature, read_signature, shown
from llm_pg.rewards.loading import LoadError, Target, load, target_of
from llm_pg.rewards.models import ModelReward, is_module, names_model
from llm_pg.rewards.pool import PoolError, UnloadedError, WorkerPool
from reward_fns.registry import RewardInfo, rewards

LOAD_DEADLINE = 120.0


@dataclass(frozen=True)
class RewardFunction:
    """A reward function that was found and whose signature fits the contract.

    name: under which it is logged. target: where a worker loads it; None for one that runs in this process, `reason`
    then says why. function: the object, when the user gave one or it is shipped. options: keyword arguments fixed for
    the run. info: range and floor, when it is shipped.
    """

    name: str
    signature: Signature
    target: Target | None
    function: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    info: RewardInfo | None = None
    reason: str = ""

    def check_columns(self, columns: Sequence[str]) -> None:
        """ValueError naming the first column that the function needs and the dataset does not have."""
        for name in self.signature.required:
            if name in self.options or name in columns:
                continue
            near = get_close_matches(name, columns, n=1)
            column = usual_column(name, columns) or (near[0] if near else None)
            mapped = "Map a column to that name"
            if column is not None:
                mapped = (
                    f"Is it {column!r}? Then set columns={json.dumps({name: column})} (in quotes on a command line)"
                )
            raise ValueError(
                f"Reward function {self.name} needs the column {name!r}, which the dataset does not have. "
                f"Present: {', '.join(columns) or 'none'}. {mapped}, give the parameter a default, or fix it with "
                f"{{function: ..., {name}: ...}}."
            )

    def check_rows(self, rows: Sequence[Mapping[str, Any]], where: Callable[[int], str] = "row {}".format) -> None:
        """ValueError naming the rows that the function could never grade, as its `reward_info.check_row` finds them.

        where: the name of a row by its place.
        """
        if self.info is None or self.info.check_row is None:
            return
        problems: list[tuple[int, str]] = []
        for place, row in enumerate(rows):
            try:
                self.info.check_row(**{**row, **self.options})
            except (ValueError, TypeError) as error:
                problems.append((place, str(error)))
        if problems:
            more = [where(place) for place, _ in problems[1:4]]
            listed = f" So it is with {', '.join(more)}{' ...' if len(problems) > 4 else ''}." if more else ""
            raise ValueError(
                f"Reward function {self.name} cannot grade {len(problems)} of {len(rows)} rows. The first is "
                f"{where(problems[0][0])}: {problems[0][1]}{listed} Mend or leave out these rows."
            )

    def check_portable(self) -> None:
        """ValueError for an option that would not reach a worker as it is."""
        for option, value in self.options.items():
            if not _survives_json(value):
                raise ValueError(
                    f"The option {option!r} of reward function {self.name} is {shown(value)}, which cannot be sent to "
                    "the reward workers: they get JSON. Use numbers, texts, lists and mappings whose keys are texts, "
                    "make other objects inside the function, or run with in_process=True."
                )

    def loaded(self) -> Callable[..., Any]:
        """The function itself, loaded into this process."""
        if self.function is not None:
            return self.function
        assert self.target is not None
        return load(self.target)

    def for_worker(self) -> dict[str, Any]:
        """What a worker needs to load it, as JSON."""
        assert self.target is not None
        return {"name": self.name, "target": self.target.to_json(), "options": self.options}


Spec = str | Callable[..., Any] | Mapping[str, Any] | RewardFunction


def resolve(spec: Spec) -> RewardFunction:
    """The reward function that a spec names.

    spec: a function; "module:function"; "path/file.py:function"; the name of a shipped one; `functools.partial` of a
    function; a reward model, as hub id, folder or torch module; or a mapping {"function": one of these, name: value,
    ...} whose other keys are fixed arguments. A module or file is loaded in a worker process, never in this one; a
    reward model in this one, with its first completions.

    Raises ValueError, in under a second where the module loads as fast, for what cannot be found (with near names),
    does not load, or has a signature of neither form.
    """
    return resolve_all([spec])[0]


def resolve_all(specs: Sequence[Spec]) -> list[RewardFunction]:
    """`resolve` for several specs with one worker process; equal names are distinguished by a number."""
    drafts = [_draft(spec) for spec in specs]
    unread = [place for place, draft in enumerate(drafts) if isinstance(draft, _Unread)]
    read = iter(_read([drafts[place] for place in unread]))  # type: ignore[misc]
    functions = [next(read) if isinstance(draft, _Unread) else draft for draft in drafts]
    named: dict[str, RewardFunction] = {}
    for function in functions:
        _check_options(function)
        _check_form(function)
        tries = (f"{function.name}_{count}" for count in itertools.count(2))
        name = next(name for name in itertools.chain([function.name], tries) if name not in named)
        named[name] = replace(function, name=name)
    return list(named.values())


@dataclass(frozen=True)
class _Unread:
    """A function whose address is known and whose signature is not."""

    spec: str
    name: str
    target: Target
    options: dict[str, Any]


def _draft(spec: Spec) -> RewardFunction | _Unread:
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        if "function" not in spec:
            raise ValueError(
                f"A reward function as a mapping needs the key 'function'; got {', '.join(spec) or 'none'}."
            )
        options = {key: value for key, value in spec.items() if key != "function"}
        spec = spec["function"]
    while isinstance(spec, functools.partial):
        if spec.args:
            raise ValueError(f"functools.partial of {spec.func} fixes arguments by position; fix them by keyword.")
        options = {**spec.keywords, **options}
        spec = spec.func
    if isinstance(spec, RewardFunction):
        return replace(spec, options={**spec.options, **options})
    if isinstance(spec, ModelReward) or is_model(spec):
        return _of_model(spec if isinstance(spec, ModelReward) else ModelReward(spec), options)
    if isinstance(spec, str):
        return _draft_of_text(spec, options)
    if not callable(spec):
        raise ValueError(f"A reward function is a function, 'module:function' or 'file.py:function'; got {spec!r}.")
    return _of_object(spec, options)


def _of_object(function: Callable[..., Any], options: dict[str, Any]) -> RewardFunction:
    name = getattr(function, "__name__", type(function).__name__)
    target = target_of(function)
    return RewardFunction(
        name=name,
        signature=read_signature(function, name),
        target=target if isinstance(target, Target) else None,
        function=function,
        options=options,
        info=getattr(function, "reward_info", None),
        reason=target if isinstance(target, str) else "",
    )


def is_model(spec: Any) -> bool:
    """Whether a spec is a reward model: a module, or the hub id or folder of one."""
    if isinstance(spec, str):
        return ":" not in spec and spec.strip() not in rewards() and names_model(spec.strip())
    return is_module(spec)


def with_processing_classes(
    specs: Sequence[Spec], classes: Any, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[Spec]:
    """Specs in which each reward model has its tokenizer, as TRL pairs them.

    classes: one for each spec, None for functions and for models that bring theirs; or the one of a single spec; None =
    all bring theirs. Raises ValueError where the numbers differ.
    """
    given = list(classes) if isinstance(classes, (list, tuple)) else [classes]
    if classes is None:
        given = [None] * len(specs)
    if len(given) != len(specs):
        raise ValueError(
            f"reward_processing_classes has {len(given)} entries and reward_funcs {len(specs)}; their numbers must "
            "match: give one each, None for functions."
        )
    return [_with_class(spec, each, chat_template_kwargs) for spec, each in zip(specs, given, strict=True)]


def _with_class(spec: Spec, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None) -> Spec:
    if isinstance(spec, Mapping):
        return {**spec, "function": _with_class(spec["function"], tokenizer, chat_template_kwargs)}
    return ModelReward(spec, tokenizer, chat_template_kwargs) if is_model(spec) else spec


def _of_model(model: ModelReward, options: dict[str, Any]) -> RewardFunction:
    name = model.__name__
    return RewardFunction(name, read_signature(model, name), None, model, options, reason="it is a model")


def _draft_of_text(spec: str, options: dict[str, Any]) -> RewardFunction | _Unread:
    place, colon, qualname = spec.strip().rpartition(":")
    if not colon:
        return _shipped(spec.strip(), options)
    if not place or not qualname or not all(part.isidentifier() for part in qualname.split(".")):
        raise ValueError(f"A reward function is written 'module:function' or 'path/file.py:function'; got {spec!r}.")
    if place.endswith(".py") or "/" in place:
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            names = [f.name for f in path.parent.glob("*.py")] if path.parent.is_dir() else []
            raise ValueError(
                f"Reward function {spec!r}: there is no file {path}.{_near(path.name, names, 'Python files there')}"
            )
        return _Unread(spec, qualname, Target(None, str(path), qualname), options)
    return _Unread(spec, qualname, Target(place, None, qualname), options)


def _shipped(name: str, options: dict[str, Any]) -> RewardFunction:
    shipped = rewards()
    if name not in shipped:
        raise ValueError(
            f"There is no shipped reward function {name!r}.{_near(name, list(shipped), 'shipped')} For your own, write "
            "'module:function' or 'path/file.py:function'; for a reward model its hub id or folder."
        )
    info = shipped[name].info
    missing = [module for module in info.requires if find_spec(module) is None]
    if missing:
        extra = f"llm-policy-gradient[{info.extra}]" if info.extra else " ".join(missing)
        raise ValueError(
            f"Reward function {name} needs {', '.join(missing)}, not installed here: pip install '{extra}'."
        )
    return _of_object(shipped[name].function, options)


_READ: dict[tuple[Any, ...], Signature] = {}  # of functions in files, each version of a file once in a process


def _read(unread: Sequence[_Unread]) -> list[RewardFunction]:
    if not can_stand():
        return [_read_here(each) for each in unread]
    known = [_READ.get(_version(each.target)) for each in unread]
    read = iter(_read_in_worker([each for each, signature in zip(unread, known, strict=True) if signature is None]))
    signatures = [next(read) if signature is None else signature for signature in known]
    functions = []
    for each, signature in zip(unread, signatures, strict=True):
        if each.target.file is not None:
            _READ[_version(each.target)] = signature
        functions.append(RewardFunction(each.name, signature, each.target, options=each.options))
    return functions


def _version(target: Target) -> tuple[Any, ...]:
    """What changes with the function's file."""
    facts = os.stat(target.file) if target.file is not None and os.path.exists(target.file) else None
    return (target,) if facts is None else (target, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def _read_in_worker(unread: Sequence[_Unread]) -> list[Signature]:
    if not unread:
        return []
    entries = [{"name": u.name, "target": u.target.to_json(), "options": {}} for u in unread]
    try:
        with WorkerPool(entries, 1, load_deadline=LOAD_DEADLINE) as pool:
            found = pool.signatures()
    except UnloadedError as error:
        raise ValueError(explain(error, unread[error.place].spec, unread[error.place].target.qualname)) from None
    except PoolError as error:
        raise ValueError(f"Reward functions {', '.join(u.spec for u in unread)}: {error}") from error
    return [Signature(**{key: _tuple(value) for key, value in each.items()}) for each in found]


def _read_here(unread: _Unread) -> RewardFunction:
    """The same without a worker, where the system has none."""
    try:
        function = load(unread.target)
    except LoadError as error:
        failed = UnloadedError(0, error.kind, str(error), error.near)
        raise ValueError(explain(failed, unread.spec, unread.target.qualname)) from None
    signature = read_signature(function, unread.name)
    return RewardFunction(unread.name, signature, unread.target, function=function, options=unread.options)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def explain(error: UnloadedError, spec: str, qualname: str) -> str:
    """What a worker could not load, for the user."""
    if error.kind == "import":
        return f"Reward function {spec!r}: its module raised while it was loaded:\n{error.text}"
    if error.kind == "signature":
        return error.text
    wanted = qualname if error.kind == "name" else spec.rpartition(":")[0]
    what = "callables there" if error.kind == "name" else "modules"
    return f"Reward function {spec!r}: {error.text}.{_near(wanted, error.near, what)}"


def _near(name: str, names: Sequence[str], what: str) -> str:
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    listed = ", ".join(sorted(names)[:20])
    return f" There are these {what}: {listed}." if names and len(names) <= 20 else ""


def _check_options(function: RewardFunction) -> None:
    known = {*function.signature.required, *function.signature.optional}
    for option in function.options:
        if option not in known and not function.signature.takes_any:
            raise ValueError(
                f"Reward function {function.name} has no parameter {option!r}."
                f"{_near(option, sorted(known), 'parameters')}"
            )


def _check_form(function: RewardFunction) -> None:
    """Refuse a required parameter of the other form: no call would fill it, and no column may have its name."""
    form = function.signature.form
    for name in function.signature.required:
        if name in RESERVED and name not in function.options:
            whole = "all completions at once (TRL's form)" if form == "batch" else "one completion at a time"
            raise ValueError(
                f"Reward function {function.name} takes {whole}, and its parameter {name!r} belongs to the other form: "
                f"no call would fill it. Write one of the two: {FORMS}."
            )


def _survives_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _survives_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_survives_json, value))
    return value is None or isinstance(value, (str, int, float))
