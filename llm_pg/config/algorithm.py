"""The section `algorithm` of a config: the name of an algorithm and what to change in it, made from `AlgorithmSpec`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import Field, create_model, field_validator
from typing_extensions import Doc

from ..algorithms.spec import AlgorithmSpec
from ..words import annotations_of
from .section import TAKES_ADDRESS, Section

NOT_SETTINGS = ("name", "source", "advantage", "loss", "baseline_per_step")


class NamedAlgorithm(Section):
    name: str = Field(
        "grpo",
        description="A name of the table: reinforce, rloo, grpo, dr_grpo, dapo, gspo, cispo, sapo, maxrl, pass_at_k, "
        "...; or a function of yours, file.py:function or module:function, from rollouts to advantages.",
    )


def _changes() -> dict[str, Any]:
    """Returns name -> (type, field) of what may be changed in a spec; None = as the algorithm has it."""
    fields: dict[str, Any] = {}
    for name, annotation in annotations_of(AlgorithmSpec).items():
        kind, *others = get_args(annotation)
        bounds = tuple(each for each in others if not isinstance(each, Doc))
        (text,) = (each.documentation for each in others if isinstance(each, Doc))
        if bounds:
            kind = Annotated[(kind, *bounds)]
        if name in TAKES_ADDRESS:
            kind = kind | str
        if name not in NOT_SETTINGS:
            fields[name] = (kind | None, Field(None, description=text))
    return fields


if TYPE_CHECKING:

    class ChangedAlgorithm(NamedAlgorithm):
        def __getattr__(self, name: str) -> Any: ...

else:
    ChangedAlgorithm = create_model("ChangedAlgorithm", __base__=NamedAlgorithm, **_changes())


class AlgorithmConfig(ChangedAlgorithm):
    """An algorithm of the table (`name`), and what to change in it. Fields left at None keep its own value."""

    mask_truncated_completions: bool | None = Field(None, description="TRL's name for truncated=mask.")
    sync_ref_model: bool = Field(False, description="Move the reference towards the policy as training goes on.")
    ref_model_mixup_alpha: float = Field(
        0.6, gt=0, le=1, description="Share of the policy in the new reference; 1 replaces it."
    )
    ref_model_sync_steps: int = Field(512, gt=0, description="Steps between refreshes of the reference.")
    dynamic_sampling_max_rounds: int = Field(
        0,
        ge=0,
        description="Rounds in which groups with equal rewards may be replaced by those of further prompts (DAPO); "
        "0 = none. Terms that equal groups have too (KL, entropy) then weigh prompts by the chance of a mixed group.",
    )
    num_iterations: int = Field(1, gt=0, description="μ, passes over each batch of rollouts.")
    steps_per_generation: int = Field(1, gt=0, description="Optimiser steps (minibatches) per pass.")

    @field_validator("truncated", mode="before", check_fields=False)
    @classmethod
    def _older_spelling(cls, word: Any) -> Any:
        """Configs of before say penalise."""
        return "penalize" if word == "penalise" else word
