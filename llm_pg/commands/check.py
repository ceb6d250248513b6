"""`llm-pg check`: everything that can be found wrong before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import Config
from ..doctor import arithmetic, examine_config, show
from ..run.before.preflight import check_inputs, check_room, task_rewards

if TYPE_CHECKING:
    from ..rewards.audit.probes import ProbeFinding

PROBED_ROWS = 4


def check(config: Config, *, probe: bool = False, audited: int = 0) -> int:
    """Everything that can be found wrong before a run; 1 where something is.

    probe: also what the reward functions pay for nothing. audited: rows on which it is tried what they pay for right
    and for wrong answers.
    """
    rows = check_inputs(config, read_hub=True)
    check_room(config)
    _check_tools(config)
    findings = examine_config(config)
    print(f"{arithmetic(config)}\n{_rows_read(config, rows)}\n\n{show(findings)}")
    bad = any(finding.level == "problem" for finding in findings)
    if probe:
        bad = _probe(config) or bad
    if audited:
        bad = _audit(config, audited) or bad
    return int(bad)


def _check_tools(config: Config) -> None:
    """Raises ConfigError where the run would refuse its tools."""
    if not config.rollout.calls_tools:
        return
    from ..prompts.rows import draft_prompts
    from ..prompts.sources import read_sources
    from ..run.tools import check_tools

    drafts = draft_prompts(config.data, read_sources(config)[0])
    check_tools(config, [draft.content for draft in drafts], lambda text: print(f"Warning: {text}"))


def _rows_read(config: Config, rows: list[int]) -> str:
    """Of the data, in a line. rows: as `check_inputs` returns them."""
    wanted = config.data.num_eval_prompts
    if len(rows) > 1:
        held_out = f"{wanted:,} of {rows[1]:,}" if wanted < rows[1] else f"{rows[1]:,}"
        return f"Data: {rows[0]:,} rows to train on, {held_out} rows held out."
    return f"Data: {rows[0]:,} rows read, {wanted:,} of them held out." if wanted else f"Data: {rows[0]:,} rows read."


def _audit(config: Config, count: int) -> bool:
    """Whether a function pays for wrong answers to `count` of the config's rows; prints what was tried and found."""
    from ..prompts.rows import draft_prompts
    from ..prompts.sources import read_sources
    from ..rewards.audit.tries import audit_rewards, spread
    from ..rewards.scorer import Scorer
    from ..rewards.tally import RewardError
    from ..run.before.auditing import can_be_tried

    if not can_be_tried(config):
        print("\nAudit: not made, as an environment gives the rewards itself.")
        return False
    drafts = spread(draft_prompts(config.data, read_sources(config)[0]), count)
    settings = config.reward
    with Scorer(task_rewards(config), workers=settings.reward_workers, deadline=settings.reward_timeout) as scorer:
        try:
            audits = audit_rewards(scorer, [draft.content for draft in drafts], [draft.row for draft in drafts])
        except RewardError as error:
            print(f"\nAudit: {error}")
            return True
    print("\nAudit: right and wrong answers to rows of the data", *audits, sep="\n")
    return any(audit.paid for audit in audits)


def _probe(config: Config) -> bool:
    """Whether a function pays for completions without work in them, or executes them; prints which."""
    from ..prompts.rows import draft_prompts
    from ..prompts.sources import read_sources
    from ..rewards.audit.probes import probe_rewards
    from ..rewards.specs import resolve_all

    drafts = draft_prompts(config.data, read_sources(config)[0])[:PROBED_ROWS]
    functions = resolve_all(task_rewards(config))
    found = probe_rewards(
        task_rewards(config),
        [draft.content for draft in drafts],
        [draft.row for draft in drafts],
        deadline=config.reward.reward_timeout,
    )
    print(f"\nProbes: {len({f.probe for f in found})} completions without work, on {len(drafts)} rows")
    bad = [_report(function.name, [f for f in found if f.function == function.name]) for function in functions]
    return any(bad)


def _report(name: str, found: list[ProbeFinding]) -> bool:
    lowest = min((f.highest for f in found if f.highest is not None), default=None)
    paid = [f for f in found if lowest is not None and f.highest is not None and f.highest > lowest]
    failed = [f for f in found if f.problems]
    ran = [f for f in found if f.ran_code]
    print(f"{name}: " + ("every probe earns the same" if not paid else f"{len(paid)} probes earn more than the least"))
    for finding in sorted(paid, key=lambda f: -(f.highest or 0.0))[:8]:
        print(f"  pays {finding.highest:g} for {finding.probe} (the least paid is {lowest:g})")
    for finding in failed[:8]:
        print(f"  fails on {finding.probe}: {', '.join(f'{cause} ({n})' for cause, n in finding.problems.items())}")
    for finding in ran:
        print(f"  EXECUTES the completion: {finding.probe}")
    return bool(paid or failed or ran)
