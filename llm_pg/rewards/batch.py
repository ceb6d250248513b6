"""The completions of one batch, laid out as the arguments of one function: by item, or as columns."""

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from llm_pg.rewards.contract import Signature, text_of

SCALARS = (str, int, float, bool, type(None))


class RewardBatch:
    """B completions with their prompts, token ids and dataset rows.

    prompts, completions: texts, or lists of messages. completion_ids: token ids, unpadded, the end token included.
    rows: the dataset row of each completion. state: what functions see as `trainer_state`, scalars only.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        rows: Sequence[Mapping[str, Any]],
        trainer_state: Any = None,
    ) -> None:
        counts = {"prompts": len(prompts), "completion_ids": len(completion_ids), "rows": len(rows)}
        for name, count in counts.items():
            if count != len(completions):
                raise ValueError(f"score got {len(completions)} completions and {count} {name}; give one for each.")
        self.size, self.rows = len(completions), rows
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self.state = state_of(trainer_state)
        step, content = self.state.get("global_step", ""), zlib.crc32(repr((prompts, completions)).encode())
        self.seed = f"{step} {content}"  # by content, so that a resumed run draws what the uninterrupted one drew
        self._given: dict[str, Sequence[Any]] = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
        }
        self._portable: dict[str, list[Any]] = {}

    def job(self, signature: Signature, indices: Sequence[int], deadline: float) -> dict[str, Any]:
        """A job for a worker: JSON, so that nothing of ours can be changed through it.

        Raises ValueError naming the column whose values are not JSON.
        """
        return self._lay_out(signature, indices, deadline, self._portable_column)

    def job_here(self, signature: Signature, indices: Sequence[int], deadline: float) -> dict[str, Any]:
        """The same for a function in this process: deep copies, of whatever the rows hold, but the objects that
        episodes were played with, whose state it is to read."""

        def copied(name: str) -> dict[int, Any]:
            column = self._column(name)
            if name == "environments":
                return {index: column[index] for index in indices}
            return {index: copy.deepcopy(column[index]) for index in indices}

        return self._lay_out(signature, indices, deadline, copied)

    def _lay_out(self, signature: Signature, indices: Sequence[int], deadline: float, column_of: Any) -> dict[str, Any]:
        job: dict[str, Any] = {"indices": list(indices), "state": self.state, "seed": self.seed, "deadline": deadline}
        columns = {name: column_of(name) for name in signature.columns(self.columns)}
        wanted = signature.arguments
        if signature.form == "batch":
            for name in ("prompts", "completions", "completion_ids"):
                if name in wanted:
                    columns[name] = column_of(name)
            job["arguments"] = {name: [values[index] for index in indices] for name, values in columns.items()}
            return job
        for name, source in (("prompt", "prompts"), ("completion_ids", "completion_ids")):
            if name in wanted:
                columns[name] = column_of(source)
        completions = self._given["completions"]
        job["items"] = [
            {"completion": text_of(completions[index]), **{name: values[index] for name, values in columns.items()}}
            for index in indices
        ]
        return job

    def _column(self, name: str) -> Sequence[Any]:
        if name in self._given:
            return self._given[name]
        return [row.get(name) for row in self.rows]

    def _portable_column(self, name: str) -> list[Any]:
        if name not in self._portable:
            self._portable[name] = [_portable(value, name) for value in self._column(name)]
        return self._portable[name]


def state_of(trainer_state: Any) -> dict[str, Any]:
    """The scalar fields of a trainer's state: its history is long, and not what a reward is shaped by."""
    if trainer_state is None:
        return {}
    if isinstance(trainer_state, Mapping):
        fields = dict(trainer_state)
    elif is_dataclass(trainer_state) or hasattr(trainer_state, "__dict__"):
        fields = vars(trainer_state)
    else:
        raise ValueError(f"trainer_state is a mapping or an object with fields; got {trainer_state!r}.")
    return {str(name): value for name, value in fields.items() if isinstance(value, SCALARS)}


def _portable(value: Any, column: str) -> Any:
    if isinstance(value, SCALARS):
        return value
    if callable(getattr(value, "tolist", None)):
        return _portable(value.tolist(), column)
    if isinstance(value, (list, tuple)):
        if all(type(item) in SCALARS for item in value):
            return list(value)
        return [_portable(item, column) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _portable(item, column) for key, item in value.items()}
    what = "a mapping with keys that are no text" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    raise ValueError(
        f"The column {column!r} holds {what}, which cannot be sent to the reward workers: they get JSON. Convert or "
        f"drop the column, name the needed columns in the function's signature instead of **kwargs, or run with "
        f"in_process=True."
    )
