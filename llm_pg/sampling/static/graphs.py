"""A step recorded once for each of its shapes and replayed: `torch.cuda.CUDAGraph` on a GPU, the plain call elsewhere.

What was recorded reads and writes addresses. Weights that the optimiser changes in place are seen by the next replay;
where they came to stand elsewhere, or an adapter was switched, `state_of` differs and all is recorded again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger("llm_pg.sampling")

Step = Callable[[], None]
Record = Callable[[Step], Step]  # what does the same as the step when it is called
# Calls of a new shape before it is recorded, as CUDA's libraries allocate and choose on the first ones.
WARM_UP = 3


class Graphs:
    """The recorded steps of one set of buffers, one for each key."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.made: dict[Hashable, Step] = {}

    def run(self, key: Hashable, make: Callable[[], Step]) -> Step:
        """What to call for each token; `make` gives the step where `key` is new."""
        if key not in self.made:
            self.made[key] = self.record(make())
        return self.made[key]


def recorder(device: torch.device) -> Record:
    return Recorder(device) if device.type == "cuda" else lambda step: step


class Recorder:
    """Captures on one stream of its own, into one pool of memory: nothing that a step makes outlives it, so that the
    next recording may use the same. What cannot be captured once is not tried again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self.fails = False

    def __call__(self, step: Step) -> Step:
        return Captured(step, self)

    def aside(self, step: Step) -> None:
        """Run it on the stream of the capture, between what came before and what comes after."""
        present = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            step()
        present.wait_stream(self.stream)

    def capture(self, step: Step) -> Step:
        """What replays the step; the step itself where it cannot be captured, and the log says so."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (a server's, a watchdog's) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            self.fails = True
            log.warning(
                "A decoding step could not be captured as a CUDA graph, so that each token is launched by itself, "
                "which is slower: %s", error,
            )  # fmt: skip
            return step
        replay: Step = graph.replay
        return replay


class Captured:
    """A step that is run as it is at first, then captured, then replayed. Each call is one token."""

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self.step, self.recorder, self.calls = step, recorder, 0
        self.replay: Step | None = None

    def __call__(self) -> None:
        if self.replay is None and self.recorder.fails:
            self.replay = self.step
        if self.replay is None and self.calls == WARM_UP:
            self.replay = self.recorder.capture(self.step)
        if self.replay is not None:
            self.replay()
            return
        self.calls += 1
        self.recorder.aside(self.step)


def state_of(model: Any) -> tuple[Hashable, ...]:
    """What a recorded step takes for granted: where weights stand, and which adapters act and how strongly."""
    weights = (*model.parameters(), *model.buffers())
    switches = [
        (
            module.disable_adapters,
            tuple(getattr(module, "active_adapters", ())),
            tuple(getattr(module, "merged_adapters", ())),
            tuple(sorted(getattr(module, "scaling", {}).items())),
        )
        for module in model.modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # a method of transformers' models
    ]
    places = [(x.data_ptr(), x.dtype, tuple(x.shape), tuple(x.stride())) for x in weights]
    return tuple(places), tuple(switches)


def stands_whole(model: Any) -> bool:
    """Whether every weight is a plain tensor, which has an address (a sharded one has not)."""
    return all(type(x.data) is Tensor for x in model.parameters())


class NotStatic(RuntimeError):
    """An operation that waits for the host, or whose shape or random state no recording could hold."""


class OnlyStatic(TorchDispatchMode):
    """Inside the block an operation that a CUDA graph could not hold raises `NotStatic`, on any device."""

    TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
    # Without a tag: bring numbers from the host, or sort and count unseen.
    NAMES = ("aten::lift_fresh", "aten::isin", "aten::_pin_memory")
    BY_INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in self.BY_INDEX:
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                raise NotStatic(f"{name} by a mask has a shape that hangs on its values")
        elif name in self.NAMES or any(tag in func.tags for tag in self.TAGS):
            raise NotStatic(f"{name} cannot be part of a recorded step")
        out = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_"):
            other = args[1] if name == "aten::copy_" else out
            if args[0].device.type != other.device.type:
                raise NotStatic(f"{name} from {args[0].device} to {other.device} waits for the host")
        return out
