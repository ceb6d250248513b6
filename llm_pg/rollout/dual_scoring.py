"""The strict and the lenient score of an evaluation: what decides a pass, and its other reading."""

from __future__ import annotations

from dataclasses import dataclass

import reward_fns.dual_scoring

from ..config import Config
from ..rewards.scorer import Scorer
from ..rewards.specs import RewardFunction, Spec

IN_WORKER = {"boxed_equivalence"}  # computer algebra may need to be stopped


@dataclass
class DualScoring:
    """scorer: of the other readings. names: strict and lenient -> its function there; None = what decides a pass."""

    scorer: Scorer
    names: dict[str, str | None]


def make_dual_scoring(config: Config, functions: list[RewardFunction]) -> DualScoring | None:
    """The readings that `eval.strict_reward` and `eval.lenient_reward` name, else those shipped for the function that
    decides a pass; None where there are none."""
    settings = config.eval
    given: dict[str, Spec | None] = {"strict": settings.strict_reward, "lenient": settings.lenient_reward}
    in_process = config.reward.reward_in_process
    if not any(given.values()):
        deciding = settings.pass_reward or functions[0].name
        known = next((f for f in functions if f.name == deciding and f.info is not None), None)
        reading, name = reward_fns.dual_scoring.OTHER_READINGS.get(deciding, ("", ""))
        if known is None or not name:
            return None
        function = getattr(reward_fns.dual_scoring, name)
        given[reading] = {"function": function, **known.options} if known.options else function
        in_process = in_process or name not in IN_WORKER
    specs = {reading: spec for reading, spec in given.items() if spec is not None}
    scorer = Scorer(
        list(specs.values()),
        workers=1,
        deadline=config.reward.reward_timeout,
        in_process=in_process,
        max_unscorable=1.0,
    )
    of_reading = dict(zip(specs, (function.name for function in scorer.functions), strict=True))
    return DualScoring(scorer, {reading: of_reading.get(reading) for reading in given})
