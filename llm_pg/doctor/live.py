"""Rules on a run that goes on or has ended. They read its folder only, so that they serve during and after it.

A rule looks at the last steps (a tenth of the run, 5 to 50 of them) and is silent before there are as many. A run that
has solved its task is not ill: groups without differences and a low entropy are then what success looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median

from ..algorithms.spec import GROUP_BASELINES
from ..algorithms.table import ALGORITHMS
from .evidence import SOLVED, Run, RunCase, read_run
from .finding import Finding

UNIFORM, TRUNCATED, UNSCORABLE = 0.7, 0.25, 0.02
COLLAPSED_ENTROPY = 0.1  # nats a token
RUNAWAY_KL, KL_GROWTH = 1.0, 1.5
# A gap of 0.05 nats a token that is the same at every step turns the gradient by a tenth, four times as much by a
# third; one by rounding, which is new at every token, by a fiftieth (tests/doctor/test_gap_threshold.py).
SAMPLER_GAP, CLIPPED = 0.05, 0.3
FORMAT_GAIN, TASK_GAIN, HACKED_GAIN = 0.2, 0.02, 0.1
FORM_IGNORED = 0.2  # share of the held-out answers that are right, and not in the form asked for


Rule = Callable[[RunCase], Iterator[Finding]]


def uniform_groups(case: RunCase) -> Iterator[Finding]:
    share = case.recent("uniform_groups")
    row = ALGORITHMS.get(case.run.setting("algorithm", "name", ""))
    baseline = case.run.setting("algorithm", "baseline", row.baseline if row else "")
    taught = case.recent("teacher_kl") is not None  # equal rewards are not silent then
    if share is None or share < UNIFORM or case.solved or taught or baseline not in GROUP_BASELINES:
        return
    yield Finding(
        "uniform-groups",
        "problem" if share > 0.95 else "warning",
        "In most groups all completions earn the same, so that their advantages are 0 and the step learns from few.",
        f"uniform_groups {share:.0%} {case.span()}, mean reward {case.recent('reward'):.3g}",
        "The task is too hard as sampled: take easier prompts, a reward with steps in between, more num_generations, "
        "a warm start, a higher temperature, curriculum=pass_rate, or dynamic_sampling_max_rounds=3.",
        "DAPO's dynamic sampling meets the same: Yu et al. 2025, arXiv 2503.14476",
    )


def truncation(case: RunCase) -> Iterator[Finding]:
    share = case.recent("truncated")
    if share is None or share < TRUNCATED:
        return
    length = case.run.setting("rollout", "max_completion_length", "?")
    yield Finding(
        "truncation",
        "problem" if share > 0.6 else "warning",
        "Many completions are cut by the length limit before their answer: right reasoning is scored as wrong.",
        f"truncated {share:.0%} {case.span()}, mean length {case.recent('completion_length') or 0:.0f} of "
        f"max_completion_length {length}",
        "Raise max_completion_length; or truncated=mask so that cut completions carry no gradient. If the model never "
        "ends, see that its end token is trained (warm start).",
        "DAPO's overlong filtering: Yu et al. 2025, arXiv 2503.14476",
    )


def entropy_collapse(case: RunCase) -> Iterator[Finding]:
    entropy, begin = case.recent("entropy"), case.first("entropy")
    if entropy is None or begin is None or entropy >= COLLAPSED_ENTROPY or case.solved:
        return
    if case.recent("reward") is None:  # it cannot be known whether the task is solved
        return
    if case.recent("entropy_coef") or case.gain("entropy") >= 0:
        return
    yield Finding(
        "entropy-collapse",
        "problem",
        "The policy has become certain before the task is solved: it no longer tries anything that could be better.",
        f"entropy {entropy:.3f} nats/token {case.span()} (from {begin:.3f}), entropy_coef 0, mean reward "
        f"{case.recent('reward') or 0:.3g}",
        "Set entropy_coef (0.01, with entropy_coef_final=0), lower the learning rate, or take epsilon_high=0.28 "
        "where batches are reused; start again from a checkpoint before the fall.",
        "Williams and Peng 1991; Yu et al. 2025, arXiv 2503.14476 (clip-higher)",
    )


def kl_runaway(case: RunCase) -> Iterator[Finding]:
    values, kl = case.run.values("kl"), case.recent("kl")
    if kl is None or kl < RUNAWAY_KL or len(values) < 3 * case.window:
        return
    middle = fmean(values[len(values) // 2 - case.window // 2 :][: case.window])
    if kl < KL_GROWTH * middle:
        return
    yield Finding(
        "kl-runaway",
        "problem",
        "The policy leaves the reference ever faster; such runs end in text that only the reward likes.",
        f"kl {kl:.2f} nats/token {case.span()}, {middle:.2f} in the middle of the run",
        "Raise beta, lower the learning rate or max_grad_norm, and read the latest completions.",
        "Gao et al. 2022, arXiv 2210.10760",
    )


def sampler_drift(case: RunCase) -> Iterator[Finding]:
    gap = case.recent("sampler_gap")
    if gap is None or gap < SAMPLER_GAP or case.recent("staleness"):  # old completions differ by what was learned
        return
    yield Finding(
        "sampler-drift",
        "problem" if gap > 4 * SAMPLER_GAP else "warning",
        "The sampler and the trainer disagree about the probability of the same tokens at the same weights: what is "
        "trained is not what was sampled.",
        f"sampler_gap {gap:.3g} nats/token {case.span()} (float32: about 1e-5, bfloat16: about 0.02)",
        "Sample with the same dtype as the trainer or in float32; see that temperature and the chat template agree; "
        "take engine=native, with exact_on_policy=true where it must be 0.",
        "Yao et al. 2025, Your efficient RL framework secretly brings you off-policy RL training",
    )


def clipped_updates(case: RunCase) -> Iterator[Finding]:
    share = case.recent("clip_fraction")
    if share is None or share < CLIPPED or case.run.setting("algorithm", "name") == "gspo":
        return
    yield Finding(
        "clipped",
        "warning",
        "Much of each batch is clipped: the data are stale before they are used up.",
        f"clip_fraction {share:.0%} {case.span()}",
        "Lower num_iterations, steps_per_generation or the learning rate.",
        "Schulman et al. 2017, arXiv 1707.06347",
    )


def noisy_gradient(case: RunCase) -> Iterator[Finding]:
    signal, noise = case.run.values("gradient_signal"), case.run.values("gradient_noise")
    if min(len(signal), len(noise)) < 2 * case.window:
        return
    mean_signal, mean_noise = fmean(signal[-2 * case.window :]), fmean(noise[-2 * case.window :])
    prompts = case.run.prompts_per_step
    if mean_noise <= 0 or mean_signal * prompts * 4 >= mean_noise or case.solved:
        return
    more = f"about {mean_noise / mean_signal - prompts:.0f} more prompts" if mean_signal > 0 else "many more prompts"
    yield Finding(
        "noisy-gradient",
        "warning",
        "The gradient of a step is mostly noise: its length is that of the differences between prompts.",
        f"signal {mean_signal:.3g}, noise of one group {mean_noise:.3g}, {prompts} groups a step",
        f"Sample {more} per step (equal parts of signal and noise), or lower the learning rate.",
        "McCandlish et al. 2018, arXiv 1812.06162",
    )


def unscorable(case: RunCase) -> Iterator[Finding]:
    values = case.run.values("unscorable")
    if not values or fmean(values) < UNSCORABLE:
        return
    yield Finding(
        "unscorable",
        "warning",
        "Some completions cannot be scored; they carry no gradient, and the rest is a biased choice.",
        f"unscorable {fmean(values):.1%} of all completions, at most {max(values):.0%} in a step",
        "Read rewards.log in the run's folder: it names the function and the cause; raise reward_timeout if it is "
        "time.",
        "rewards.log of the run",
    )


def skipped_updates(case: RunCase) -> Iterator[Finding]:
    skipped = [(step, n) for step, n in case.run.series("skipped_updates") if n]
    if not skipped:
        return
    yield Finding(
        "skipped-updates",
        "warning",
        "Gradients that were not finite: those updates were left out.",
        f"{sum(n for _, n in skipped):.0f} updates, at steps {', '.join(str(step) for step, _ in skipped[:5])}"
        f"{' ...' if len(skipped) > 5 else ''}",
        "fp16: prefer bf16. Otherwise lower the learning rate, and look at the completions of these steps.",
        "metrics.jsonl of the run",
    )


def format_only(case: RunCase) -> Iterator[Finding]:
    deciding = f"reward/{case.deciding}"
    if not case.deciding or case.gain(deciding) > TASK_GAIN or (case.recent(deciding) or 0) >= SOLVED:
        return
    names = {name for m in case.run.metrics for name in m if name.startswith("reward/")} - {deciding}
    grown = {name: case.gain(name) for name in names if not name.startswith(deciding + "/")}
    grown = {name: gain for name, gain in sorted(grown.items()) if gain >= FORMAT_GAIN}
    if grown:
        parts = ", ".join(f"{name} {gain:+.2f}" for name, gain in grown.items())
        yield Finding(
            "format-only",
            "warning",
            "What grows is not the part that decides a pass: the model learns the form of an answer, not the answer.",
            f"{parts}; {deciding} {case.gain(deciding):+.2f} (last against first {case.window} steps)",
            "Lower the weight of the other parts (reward_weights) once they are learned, or give them only to right "
            "answers.",
            "Skalse et al. 2022, arXiv 2209.13085",
        )


def strict_against_lenient(case: RunCase) -> Iterator[Finding]:
    """A strict score that rises while a lenient one of the same answers does not: only the format was learned."""
    names = {name for m in case.run.metrics for name in m}
    for strict in sorted(name for name in names if "strict" in name):
        lenient = strict.replace("strict", "lenient")
        if lenient not in names or case.gain(strict) < HACKED_GAIN or case.gain(lenient) > TASK_GAIN:
            continue
        yield Finding(
            "format-only",
            "warning",
            "The strict score rises and the lenient one does not: the gain is format only.",
            f"{strict} {case.gain(strict):+.2f}, {lenient} {case.gain(lenient):+.2f}",
            "Report the lenient score as the result; teach the format by a short warm start instead.",
            "Chandak et al. 2025, Incorrect baseline evaluations call into question recent LLM-RL claims",
        )


def format_gain_held_out(case: RunCase) -> Iterator[Finding]:
    """The same of the held-out answers before the run and after it, beyond what chance explains."""
    summary = case.run.summary
    names = ("strict_before", "strict_after", "lenient_before", "lenient_after")
    shares = [summary[name] for name in names if summary.get(name)]
    if len(shares) < len(names):
        return
    (strict, _, highest), (after, lowest, _), (lenient, *_), (lenient_after, *_) = shares
    if after - strict < HACKED_GAIN or lowest <= highest or lenient_after - lenient > TASK_GAIN:
        return
    yield Finding(
        "format-only",
        "warning",
        "On held-out prompts the strict score rises and the lenient one does not: the gain is format only.",
        f"strict {strict:.1%} before, {after:.1%} after; lenient {lenient:.1%} before, {lenient_after:.1%} after",
        "Report the lenient score as the result; teach the format by a short warm start instead.",
        "Chandak et al. 2025, Incorrect baseline evaluations call into question recent LLM-RL claims",
    )


def ignored_form(case: RunCase) -> Iterator[Finding]:
    """Right answers that are not where the prompt asks for them, in the newest evaluation."""
    passed, strict = case.newest("eval/greedy", "pass_rate_after"), case.newest("eval/strict", "strict_after")
    if passed is None or strict is None or passed - strict < FORM_IGNORED:
        return
    yield Finding(
        "form-ignored",
        "warning",
        "Many held-out answers are right and not in the form that a strict reading wants, such as a number after ####: "
        "a program that reads the form will not find them.",
        f"held out {passed:.1%} pass, {strict:.1%} when read strictly; {case.deciding or 'the reward'} pays both",
        "Pay for the form too: a second function (format_regex, pattern #### and whole false) of a small weight, or "
        "the strict reading itself as the reward once it is sometimes earned. Or drop the form from the prompt.",
        "eval/strict and eval/lenient in metrics.jsonl and summary.json",
    )


def hacked_reward(case: RunCase) -> Iterator[Finding]:
    before = case.run.before.get("greedy") or {}
    after = case.newest("eval/greedy", "pass_rate_after")
    if not before or after is None or case.gain("reward") < HACKED_GAIN or after >= before["low"]:
        return
    yield Finding(
        "reward-hacking",
        "problem",
        "The reward rises while the held-out pass rate falls: the reward pays for something else, or the prompts are "
        "learned by heart.",
        f"reward {case.gain('reward'):+.2f} (last against first {case.window} steps); held out {before['mean']:.1%} "
        f"[{before['low']:.1%}, {before['high']:.1%}] before, {after:.1%} now",
        "Read the completions with the highest reward; test the reward function with hostile answers "
        "(llm_pg.rewards.audit.probes); hold out prompts of the same kind.",
        "Amodei et al. 2016, arXiv 1606.06565; Gao et al. 2022, arXiv 2210.10760",
    )


def unreached_threshold(case: RunCase) -> Iterator[Finding]:
    """A dense reward that never counts as a pass: the pass rate is 0 whatever is learned."""
    run = case.run
    scores = [run.before.get("highest"), run.summary.get("highest_score_after"), *run.values("eval/highest_score")]
    highest = max((score for score in scores if score is not None), default=None)
    threshold = float(run.setting("eval", "pass_threshold", 1.0))
    if highest is None or highest >= threshold:
        return
    rewards = [run.before.get("reward"), case.newest("eval/reward", "reward_after")]
    reported = [each["mean"] if isinstance(each, dict) else each for each in rewards]
    shown = " and ".join("unknown" if value is None else f"{value:.3g}" for value in reported)
    yield Finding(
        "threshold-unreached",
        "note",
        "No held-out completion ever passed, as no score reached the threshold of a pass.",
        f"eval.pass_threshold {threshold:g}, highest score {highest:.3g}; mean reward {shown} before and now",
        "Read the mean reward (eval/reward), keep the best model by it (metric_for_best_model=eval_reward), or set "
        "pass_threshold to the score that counts as a pass.",
        "the deciding function is eval.pass_reward, or the first",
    )


def no_gradient(case: RunCase) -> Iterator[Finding]:
    # In its warm-up the critic learns alone, at a rate of 0 for the policy.
    alone = {int(m["step"]) for m in case.run.metrics if m.get("critic_grad_norm") and m.get("learning_rate") == 0}
    norms, steps = [norm for step, norm in case.run.series("grad_norm") if step not in alone], case.window
    if len(norms) < steps or median(norms[-steps:]) > 0 or case.solved:
        return
    yield Finding(
        "no-gradient",
        "problem",
        "The gradient is exactly 0: nothing is learned.",
        f"grad_norm 0 {case.span()}, reward_std {case.recent('reward_std') or 0:.3g}",
        "All rewards of a group are equal, or nothing is trainable: see that the reward ever differs and that the "
        "adapter is active.",
        "a loss of 0 is normal on-policy, a gradient of 0 is not",
    )


LIVE_RULES: dict[str, tuple[Rule, ...]] = {
    "uniform-groups": (uniform_groups,),
    "truncation": (truncation,),
    "entropy-collapse": (entropy_collapse,),
    "kl-runaway": (kl_runaway,),
    "sampler-drift": (sampler_drift,),
    "clipped": (clipped_updates,),
    "noisy-gradient": (noisy_gradient,),
    "unscorable": (unscorable,),
    "skipped-updates": (skipped_updates,),
    "format-only": (format_only, strict_against_lenient, format_gain_held_out),
    "form-ignored": (ignored_form,),
    "reward-hacking": (hacked_reward,),
    "threshold-unreached": (unreached_threshold,),
    "no-gradient": (no_gradient,),
}


def examine(run: Run) -> list[Finding]:
    """Findings on a run that was read, those first that it wrote into its summary itself."""
    if not run.metrics:
        return []
    case = RunCase(run)
    own = [Finding(**finding) for finding in run.summary.get("findings") or []]
    return own + [finding for rules in LIVE_RULES.values() for rule in rules for finding in rule(case)]


def examine_run(path: str | Path) -> list[Finding]:
    """Returns findings on the run in a folder.

    Args:
        path: the run's folder.

    Raises:
        ConfigError: the folder holds no run.
    """
    return examine(read_run(path))
