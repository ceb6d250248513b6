"""The reward functions tried on right and wrong answers to a run's own rows, before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...config import Config
from ...prompts import Prompt
from ...rewards.audit.tries import audit_rewards, spread
from ...rewards.scorer import Scorer
from ...rewards.tally import RewardError
from ..guard import RunStopped

ROWS = 32
SECONDS = 2.0


def can_be_tried(config: Config) -> bool:
    """Whether an answer can be scored alone, without an environment that it was given in."""
    return config.rollout.environment is None and config.rollout.environment_factory is None


def audit_run(config: Config, scorer: Scorer, prompts: Sequence[Prompt], warn: Callable[[str], None]) -> None:
    """Warns where a reward function pays wrong answers to some of these prompts, or loses right ones.

    Nothing is tried where `reward.audit_rewards` is none, or where an environment gives the rewards.
    Raises RunStopped where it is stop and a wrong answer is paid.
    """
    asked = config.reward.audit_rewards
    if asked == "none" or not can_be_tried(config):
        return
    chosen = spread(prompts, ROWS)
    contents = [prompt.text if prompt.messages is None else prompt.messages for prompt in chosen]
    advice = "llm-pg check --audit-rewards tries more rows; reward.audit_rewards=none leaves this out."
    try:
        audits = audit_rewards(scorer, contents, [prompt.row for prompt in chosen], seconds=SECONDS)
    except RewardError as error:
        if asked == "stop":
            raise
        warn(f"The audit of the reward functions ended early, as a training step would where it meets this: {error}")
        return
    for audit in audits:
        if audit.paid and asked == "stop":
            raise RunStopped(f"Reward function {audit}\nreward.audit_rewards is stop. {advice}")
        if audit.paid or audit.lost:
            warn(f"Reward function {audit}\n{advice}")
