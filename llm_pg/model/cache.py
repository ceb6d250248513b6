"""The cache that a model makes itself: a pass after another, and rows chosen, repeated, put below each other.

Caches differ: keys and values, windows of them, convolution and recurrent states, compressed keys. Their methods to
choose rows differ too, and some forget half of a layer. So what a cache holds is found by its shape: passes of two and
of three rows, and of two and of three tokens, show which axis of each tensor counts rows, which counts tokens, and
which numbers count tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from .attention import body_of, core_of

Path = tuple[Any, ...]
# What a model's output calls its cache, and its forward takes it by. rwkv has a state, xlstm cache_params.
NAMES = ("past_key_values", "cache_params", "state")


class UnknownCache(ValueError):
    """The cache holds something whose rows were not found."""


@dataclass
class _Leaf:
    """A tensor or a whole number somewhere in a cache."""

    path: Path
    holder: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.holder[self.key]

    def put(self, value: Any) -> None:
        self.holder[self.key] = value


def _leaves(part: Any, path: Path = ()) -> Iterator[_Leaf]:
    """Tensors and whole numbers that `part` holds, in a fixed order."""
    items: Any
    holder: Any
    if isinstance(part, list):
        items, holder = list(enumerate(part)), part
    elif isinstance(part, dict):
        items, holder = list(part.items()), part
    elif hasattr(part, "__dict__") and not isinstance(part, PreTrainedConfig | torch.nn.Module | type):
        items, holder = list(vars(part).items()), vars(part)
    else:
        return
    for key, value in items:
        if isinstance(value, Tensor) or (isinstance(value, int) and not isinstance(value, bool)):
            yield _Leaf((*path, key), holder, key)
        else:
            yield from _leaves(value, (*path, key))


def _axis(one: Tensor, other: Tensor) -> int | None:
    """The axis in which two tensors differ in size; None = in none."""
    if one.dim() != other.dim():
        raise UnknownCache(f"its tensors have {one.dim()} axes at one time and {other.dim()} at another")
    axes = [i for i, (n, m) in enumerate(zip(one.shape, other.shape, strict=True)) if n != m]
    if len(axes) > 1:
        raise UnknownCache("a tensor changes its size in several axes")
    return axes[0] if axes else None


class CacheRows:
    """Works on the caches of one model.

    Args:
        made: caches of passes of (2 rows, 2 tokens), (3, 2) and (2, 3).

    Raises:
        UnknownCache: they do not show what counts rows.
    """

    def __init__(self, made: tuple[Any, Any, Any]) -> None:
        plain, more_rows, longer = ({leaf.path: leaf.value for leaf in _leaves(cache)} for cache in made)
        self.row_axis: dict[Path, int | None] = {}
        self.token_axis: dict[Path, int | None] = {}
        self.counts: set[Path] = set()
        for path, value in plain.items():
            if path not in more_rows or path not in longer:
                raise UnknownCache("it holds other things for other rows")
            if isinstance(value, Tensor):
                self.row_axis[path] = _axis(value, more_rows[path])
                self.token_axis[path] = _axis(value, longer[path])
            elif value != longer[path]:
                self.counts.add(path)
        if not any(axis is not None for axis in self.row_axis.values()):
            raise UnknownCache("it holds nothing a row")

    def select(self, cache: Any, index: Tensor) -> None:
        """`cache` of the rows `index` alone, int64 (R,), in place; a row may be there several times."""
        for leaf in _leaves(cache):
            if isinstance(leaf.value, Tensor):
                axis = self._row_axis(leaf.path)
                if axis is not None:
                    leaf.put(leaf.value.index_select(axis, index))

    def join(self, cache: Any, other: Any, width: int) -> None:
        """Puts the rows of `other` below those of `cache`, in place; both as if of `width` tokens, shorter ones with
        zeros before them, which must be masked."""
        more = {leaf.path: leaf.value for leaf in _leaves(other)}
        for leaf in _leaves(cache):
            if leaf.path in self.counts:
                leaf.put(width)
            elif isinstance(leaf.value, Tensor):
                axis = self._row_axis(leaf.path)
                if axis is not None:
                    leaf.put(torch.cat(self._alike(leaf.path, leaf.value, more[leaf.path]), axis))

    def cut(self, cache: Any, width: int, new_width: int) -> None:
        """Of a cache of `width` tokens the last `new_width`, in place."""
        for leaf in _leaves(cache):
            if leaf.path in self.counts:
                leaf.put(new_width)
                continue
            axis = self.token_axis.get(leaf.path)
            if axis is not None:
                size = leaf.value.shape[axis]
                kept = min(size, new_width)
                leaf.put(leaf.value.narrow(axis, size - kept, kept))

    def _row_axis(self, path: Path) -> int | None:
        if path not in self.row_axis:
            raise UnknownCache(f"its part {'.'.join(map(str, path))} came later")
        return self.row_axis[path]

    def _alike(self, path: Path, x: Tensor, y: Tensor) -> list[Tensor]:
        axis = self.token_axis[path]
        if axis is None:
            return [x, y]
        size = max(x.shape[axis], y.shape[axis])
        behind = x.dim() - 1 - axis
        return [F.pad(t, [0, 0] * behind + [size - t.shape[axis], 0]) for t in (x, y)]


class CachedForward:
    """Passes of a model, or of its body, with the cache as one value, and how to work on its rows.

    Most models return their cache; a few keep parts of it in their modules, which are then taken out and put back.

    Args:
        model: whose passes. of_body: those of its body, without the output layer.

    Raises:
        UnknownCache: the model makes no cache, or one whose rows are not found.
    """

    def __init__(self, model: Any, *, of_body: bool = False) -> None:
        self.module, self.config = body_of(model) if of_body else model, core_of(model).config
        takes = inspect.signature(core_of(self.module).forward).parameters
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        vocabulary = core_of(model).get_input_embeddings().weight.shape[0]
        self.name, self.given = NAMES[0], False  # whether the model has to be given an empty cache
        self.held: list[tuple[str, str]] = []  # the path of a module, and the name of a tensor in it
        ids = torch.arange(6, device=model.device).view(3, 2) % vocabulary
        self._find(ids)
        made = [self(part, None, torch.ones_like(part), None)[1] for part in (ids[:2], ids, ids.view(2, 3))]
        self.rows = CacheRows((made[0], made[1], made[2]))

    def __call__(
        self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, cache: Any, module: Any = None
    ) -> tuple[Any, Any]:
        """The output, of a model with logits of the last tokens alone, and the cache after it.

        cache: None = there is nothing before. module: another of the same architecture, such as a reference.
        """
        module = self.module if module is None else module
        past = {} if positions is None else {"position_ids": positions}
        if cache is not None:
            past[self.name] = cache["returned"]
            for (path, name), value in zip(self.held, cache["held"], strict=True):
                setattr(module.get_submodule(path), name, value)
        elif self.given:
            past[self.name] = DynamicCache(config=self.config)
        out = module(input_ids=ids, attention_mask=mask, use_cache=True, **past, **self.options)
        returned = past[self.name] if self.given else out[self.name]
        return out, {
            "returned": returned,
            "held": [getattr(module.get_submodule(path), name) for path, name in self.held],
        }

    def _find(self, ids: Tensor) -> None:
        """Where the cache is: what the output calls it, and which tensors in modules grow with the rows."""
        before = None
        for part in (ids[:2], ids):
            out = self.module(input_ids=part, attention_mask=torch.ones_like(part), use_cache=True)
            modules = list(self.module.named_modules())
            now = {(path, n): x.shape for path, m in modules for n, x in vars(m).items() if isinstance(x, Tensor)}
            if before is not None:
                self.held = [place for place, shape in now.items() if shape != before.get(place, shape)]
            before = now
        name = next((name for name in NAMES if out.get(name) is not None), None)
        if name is None and not self.held:
            raise UnknownCache("it returns no cache")
        self.name, self.given = name or NAMES[0], name is None


def without_copies(cache: Any) -> None:
    """Makes the states of `cache` be put in place of the old ones, not copied into them, which a backward pass reads.

    Only the layers of transformers with recurrent states copy into them.
    """
    for layer in getattr(cache["returned"], "layers", []):
        if hasattr(layer, "update_recurrent_state"):
            layer.update_recurrent_state = _put_state(layer)


def _put_state(layer: Any) -> Any:
    def put(recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        layer.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    return put
