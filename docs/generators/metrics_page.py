"""Prints `docs/metrics.md`, or writes it to a file that is named, from the table of metrics and the doctor's limits."""

from __future__ import annotations

from publish import publish

from llm_pg.doctor.live import (
    CLIPPED,
    COLLAPSED_ENTROPY,
    RUNAWAY_KL,
    SAMPLER_GAP,
    SOLVED,
    TRUNCATED,
    UNIFORM,
    UNSCORABLE,
)
from llm_pg.metrics import METRICS

# name -> how to read it: what is normal, what is not, and what to do then.
READING: dict[str, str] = {
    "reward": "The curve to watch, with the held-out pass rate beside it. Noisy: compare means over ten steps, not two "
    "steps. Up while eval/greedy goes down: the reward is being gamed.",
    "reward_std": "0 means that all completions earn the same, and a group baseline then leaves nothing to learn from.",
    "reward/": "Where a sum of parts grows, see which part: format alone is not the task.",
    "unscorable": f"Should be 0; the doctor reports {UNSCORABLE:.0%} and more. rewards.log names function and cause.",
    "uniform_groups": "High at both ends: a task too hard or already solved. The doctor reports "
    f"{UNIFORM:.0%} and more while the reward is under {SOLVED:.0%} of its range.",
    "staleness": "max_staleness from step max_staleness + 1 on. Read correction_bounded beside it: over about a tenth, "
    "the correction gives much of its weight away; lower max_staleness or the learning rate.",
    "return_std": "Falls as the policy settles. Large beside return_mean: so is the variance of the gradient.",
    "true_return_mean": "Falls while return_mean rises: the proxy is being gamed.",
    "completion_length": "A rise with the reward is usual in reasoning. A rise without it: length is rewarded, or the "
    "end token is not learned.",
    "truncated": f"The doctor reports {TRUNCATED:.0%} and more: a truncated answer is scored as wrong. Raise "
    "the limit.",
    "kl": f"Grows slowly from 0. Over {RUNAWAY_KL:g} and still growing fast the policy runs away from its reference: "
    "lower the learning rate or raise beta.",
    "entropy": f"Falls as the policy learns. Under {COLLAPSED_ENTROPY:g} on an unsolved task nothing new is tried: set "
    "entropy_coef, or a lower learning rate.",
    "clip_fraction": f"0 on-policy, a few percent with reused batches; the doctor reports {CLIPPED:.0%} and more.",
    "approx_kl": "0 in the first pass. Over about 0.02 to 0.05 the batch is stale before it is used up.",
    "sampler_gap": "At most 1e-5 in float32, 2e-3 in float16, 2e-2 in bfloat16; 0 on a CPU with the kernels, and with "
    "exact_on_policy. The doctor "
    f"reports {SAMPLER_GAP:g} and more: sampler and trainer disagree on the same weights, and the ratio is not 1.",
    "policy_loss": "Near 0 on-policy by construction, whether or not it learns. Look at reward and grad_norm instead.",
    "value_loss": "Falls while the critic learns; its size is that of squared returns.",
    "explained_variance": "1 = the critic predicts returns, 0 = no better than their mean, under 0 = worse than that.",
    "grad_norm": "Single peaks are usual. Exactly 0: nothing is learned (equal rewards, or nothing is trainable). "
    "Always over max_grad_norm: the learning rate is then effectively smaller than it is set.",
    "gradient_signal": "Compare with gradient_noise; single values may be negative, their mean is unbiased.",
    "gradient_noise": "noise / signal is the number of groups at which a step is half signal. Far more than your "
    "groups: sample more prompts per step, or lower the learning rate.",
    "skipped_updates": "Should be 0. fp16 may skip a few at the start while its scale settles.",
    "oom_splits": "The gradient is the same, the step slower: lower per_device_train_batch_size.",
    "tokens_per_second": "Falls as completions of a batch end at different lengths: the longest one holds up the rest.",
    "train_tokens_per_second": "All passes of an update count as one, so it halves with num_iterations=2.",
    "mfu": "0.3 to 0.5 is good for a training pass. Lower: passes too small (raise per_device_train_batch_size), or a "
    "model so small that its overhead shows; --profile tells which.",
    "memory": "On an accelerator the peak of tensors; on the CPU that of the whole process, so that it never falls.",
    "seconds/": "The largest is what to speed up. reward large: more reward_workers. sample large: another engine.",
    "eval/": "The result. Two intervals that overlap are no proof of a difference.",
}
HEAD = """# The metrics

Made from the table in `llm_pg/metrics.py` by `python docs/generators/metrics_page.py docs/metrics.md`. Every step
is one line of `metrics.jsonl` with these names; terminal, page and trackers have the same units. A name that ends in
`…` means all names that begin with it. What could not be measured is left out; not-a-number is `null`, with its name
under `nan`.
"""


def markdown() -> str:
    """The page."""
    lines = [HEAD, "| name | unit | what it is | how to read it |", "| --- | --- | --- | --- |"]
    for name, (unit, meaning, *_) in METRICS.items():
        shown = f"`{name}…`" if name.endswith("/") else f"`{name}`"
        cells = [shown, unit or "–", meaning, READING.get(name, "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    publish(markdown())
