"""Environments for the tests, found by workers under this module's name."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakSet

from llm_pg.environments import Reply


class Echo:
    """Says back the length of each turn, pays it, and ends after `turns` turns; draws a number from its seed."""

    def __init__(self, turns: int = 3, reply: str = "{} {}\n") -> None:
        self.turns, self.reply = turns, reply

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        self.rng, self.said = random.Random(seed), 0

    def step(self, text: str) -> Reply:
        self.said += 1
        return Reply(self.reply.format(len(text), self.rng.randint(0, 9)), float(len(text)), self.said >= self.turns)


class Silent(Echo):
    """Says nothing at all."""

    def step(self, text: str) -> Reply:
        return Reply("", 1.0, super().step(text).done)


class Bad(Echo):
    """On rows with `how`: raises, sleeps, dies with its process, or has no verdict, at the second turn."""

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        super().reset(row, seed)
        self.how = row.get("how")

    def step(self, text: str) -> Reply:
        reply = super().step(text)
        if self.said == 2:
            if self.how == "raise":
                raise KeyError("no such thing")
            if self.how == "sleep":
                time.sleep(60)
            if self.how == "none":
                return Reply("", None)
        return reply


class Alive(Echo):
    """Pays the number of episodes that its process holds."""

    here: ClassVar[WeakSet[Alive]] = WeakSet()

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        super().reset(row, seed)
        self.here.add(self)

    def step(self, text: str) -> Reply:
        return Reply(super().step(text).text, float(len(self.here)), False)


class Mute:
    """No environment: it has no step."""

    def reset(self, row: Mapping[str, Any], seed: int) -> None: ...
