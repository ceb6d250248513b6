"""What each sampling engine can do beside sampling, known before one is made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Capabilities:
    """Of an engine; the defaults are those of an engine of a user's that says nothing.

    Attributes:
        older_weights: how it samples with weights of before while the policy trains: in a process of its own, from a
            copy of the model, or None = it has the present weights alone.
        keyed_draws: each row is drawn from its own key, so that a resumed run may have another number of ranks.
        served: computes in servers, which hold whole weights of their own and filter min_p before top_p.
    """

    older_weights: Literal["process", "copy"] | None = None
    keyed_draws: bool = True
    served: bool = False


ENGINES: dict[str, Capabilities] = {
    "native": Capabilities(older_weights="process"),
    "transformers": Capabilities(keyed_draws=False),
    "vllm": Capabilities(older_weights="copy", served=True),
}


def capabilities_of(engine: object) -> Capabilities:
    """Returns the attribute `capabilities` of an engine, or the defaults where it has none."""
    found = getattr(engine, "capabilities", None)
    return found if isinstance(found, Capabilities) else Capabilities()
