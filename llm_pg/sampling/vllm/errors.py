"""What can go wrong with a server, by what is to be done about it."""

from __future__ import annotations


class EngineError(RuntimeError):
    """Sampling cannot go on; one paragraph says why and what to do."""


class Unreachable(Exception):
    """This server gave no usable answer this time: no connection, a cut one, too slow, or an error of its own (5xx)."""


class TimedOut(Unreachable):
    """It took the whole time that it was given."""
