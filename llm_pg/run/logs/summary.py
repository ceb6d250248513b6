"""What `summary.json` says of a run that came to its end."""

from __future__ import annotations

from typing import Any

from ...config import Config
from ...evaluate import Evaluation


def run_summary(
    config: Config,
    before: Evaluation | None,
    after: Evaluation | None,
    *,
    algorithm: str,
    steps: int,
    seconds: dict[str, float],
    model: str,
    versions: Any,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Pass rates are null where nothing was evaluated. metrics: the last entry of TRL's log."""
    return {
        "algorithm": algorithm,
        "task": config.data.task or config.data.dataset_name or "dataset",
        "seed": config.run.seed,
        "pass_rate_before": before.greedy.mean if before else None,
        "pass_rate_before_interval": before.greedy.as_json() if before else None,
        "pass_rate_after": after.greedy.mean if after else None,
        "pass_rate_after_interval": after.greedy.as_json() if after else None,
        "sampled_before": before.sampled.mean if before and before.sampled else None,
        "sampled_after": after.sampled.mean if after and after.sampled else None,
        **_readings("before", before),
        **_readings("after", after),
        "pass_threshold": config.eval.pass_threshold,
        "pass_at_before": {str(k): share.as_json() for k, share in before.pass_at.items()} if before else {},
        "pass_at": {str(k): share.as_json() for k, share in after.pass_at.items()} if after else {},
        "num_eval_prompts": after.num_prompts if after else 0,
        "steps": steps,
        "seconds_total": round(sum(seconds.values()), 3),
        "seconds_by_phase": {phase: round(s, 3) for phase, s in seconds.items()},
        "model": model,
        "versions": versions,
        "metrics": metrics,
    }


def _readings(when: str, evaluation: Evaluation | None) -> dict[str, Any]:
    """What has no key of its own above: strict and lenient pass rates where there are two readings, mean rewards, all
    with intervals; the highest score that decides a pass, and the mean length in tokens."""
    if evaluation is None:
        return {}
    shares = {
        "strict": evaluation.strict,
        "lenient": evaluation.lenient,
        "reward": evaluation.reward,
        "sampled_reward": evaluation.sampled_reward,
    }
    out: dict[str, Any] = {f"{name}_{when}": share.as_json() for name, share in shares.items() if share is not None}
    return {**out, f"highest_score_{when}": evaluation.highest, f"mean_length_{when}": evaluation.mean_length}
