"""Reward functions with module-level state, and some that only look as if they had it."""

import collections
import functools
import itertools
import math

history = []
calls = 0
seen = set()
counts = collections.Counter()
numbers = itertools.count()
total = 0.0
latest = ""
_model = None
_table = {}
threshold = 0.25
settings = {}
LIMIT = 3


class Tracker:
    made = 0

    def __init__(self):
        self.rewards = []

    def add(self, reward):
        self.rewards.append(reward)


tracker = Tracker()


def pure(completion):
    return math.log(1 + len(completion)) / LIMIT


def keeps_a_list(completion):
    history.append(completion)
    return 1.0


def batch_keeps_a_list(completions, **kwargs):
    history.extend(completions)
    return [1.0 for _ in completions]


async def async_keeps_a_list(completion):
    history.append(completion)
    return 1.0


def keeps_a_number(completion):
    global calls
    calls += 1
    return 1.0


def keeps_a_sum(completion):
    add_up(len(completion))
    return 1.0


def add_up(length):
    global total
    total += length


def keeps_a_set(completion):
    seen.add(completion)
    return 1.0


def keeps_a_dict(completion):
    counts["of all"] += 1
    return 1.0


def keeps_a_count(completion):
    return float(next(numbers))


def keeps_a_text(completion):
    global latest
    latest = completion
    return 1.0


def keeps_an_object(completion):
    tracker.add(1.0)
    return 1.0


def keeps_a_class(completion):
    Tracker.made += 1
    return 1.0


def keeps_an_attribute(completion):
    keeps_an_attribute.calls = getattr(keeps_an_attribute, "calls", 0) + 1
    return 1.0


def lazy(completion):
    """A model and a table, made at the first call."""
    global _model
    if _model is None:
        _model = object()
        _table.update(dict.fromkeys("abcdefgh", 1))
    return float(_table["a"])


@functools.cache
def _cached(text):
    return float(len(text))


def cached(completion):
    return _cached(completion)


def reads_globals(completion):
    return threshold * (1 + len(settings))


def logs_to_wandb(completion):
    import wandb

    if wandb.run is not None:
        wandb.log({"length": len(completion)})
    return 1.0


def logs_to_trackio(completion):
    import trackio as tracked

    try:
        tracked.log({"length": len(completion)})
    except RuntimeError:
        return 0.0
    return 1.0


def begins_its_own_run(completion):
    import wandb

    if completion == "never":
        wandb.init()
        wandb.log({})
    return 1.0
