"""Held-out evaluation: greedy and sampled pass@1, pass@k, mean rewards, with bootstrap intervals over prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Z = 1.959964  # of a normal distribution, 2.5 % beyond it on each side


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its 95 % interval; as text a share in per cent."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"

    def number(self) -> str:
        """As text a number: a mean reward, which is no share."""
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def as_json(self) -> list[float]:
        return [round(x, 6) for x in (self.mean, self.low, self.high)]


@dataclass
class Evaluation:
    """Of a set of held-out prompts.

    greedy: pass rate of the greedy completion. sampled: pass rate of one sample. pass_at: k -> pass@k.
    mean_length: of the greedy completions, in tokens. unscorable: greedy completions that could not be scored
    (they count as failed). examples: prompt, completion and verdict of each prompt, greedy.
    strict, lenient: pass rates of the greedy completions read strictly (the answer in the form asked for) and leniently
    (wherever it is), where there are two readings: a gain of the first alone is one of format.
    reward, sampled_reward: mean reward, all functions weighted, of the greedy completions and of one sample, without
    those that could not be scored; None where none could. threshold: the score of the deciding function from which a
    completion passes. highest: the highest such score that any completion has; None where all have the same.
    """

    num_prompts: int
    greedy: Interval
    sampled: Interval | None
    pass_at: dict[int, Interval]
    mean_length: float
    unscorable: int
    examples: list[dict[str, Any]] = field(default_factory=list)
    strict: Interval | None = None
    lenient: Interval | None = None
    reward: Interval | None = None
    sampled_reward: Interval | None = None
    threshold: float = 1.0
    highest: float | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Evaluation:
        """Back from `dataclasses.asdict` and JSON."""
        names = ("sampled", "strict", "lenient", "reward", "sampled_reward")
        shares = {name: Interval(**values[name]) for name in names if values.get(name)}
        return cls(
            **{
                **values,
                **shares,
                "greedy": Interval(**values["greedy"]),
                "pass_at": {int(k): Interval(**share) for k, share in values["pass_at"].items()},
            }
        )

    def unreached(self) -> str:
        """Why the pass rate of 0 says nothing, where no completion's score reaches the threshold; else ""."""
        return unreached(self.threshold, self.highest)

    def metrics(self) -> dict[str, float]:
        """By the names of metrics.jsonl; what was not measured is left out."""
        out = {
            "eval/greedy": self.greedy.mean,
            "eval/greedy_low": self.greedy.low,
            "eval/greedy_high": self.greedy.high,
        }
        if self.sampled is not None:
            out["eval/sampled"] = self.sampled.mean
        out.update({f"eval/pass@{k}": share.mean for k, share in self.pass_at.items()})
        for name, share in (("strict", self.strict), ("lenient", self.lenient)):
            out.update({} if share is None else {f"eval/{name}": share.mean})
        if self.reward is not None:
            low, high = self.reward.low, self.reward.high
            out.update({"eval/reward": self.reward.mean, "eval/reward_low": low, "eval/reward_high": high})
        if self.sampled_reward is not None:
            out["eval/sampled_reward"] = self.sampled_reward.mean
        if self.highest is not None:
            out["eval/highest_score"] = self.highest
        out.update({"eval/length": self.mean_length, "eval/unscorable": float(self.unscorable)})
        return out


def unreached(threshold: float, highest: float | None) -> str:
    """Why a pass rate of 0 says nothing, where the highest score is below the threshold of a pass; else ""."""
    if highest is None or highest >= threshold:
        return ""
    return (
        f"No completion reaches eval.pass_threshold {threshold:g} (the highest score is {highest + 0.0:.3g}), so that "
        "a pass rate of 0 does not tell good from bad: read the mean reward, or set the threshold to what counts as a "
        "pass."
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k samples passes, from c passes among n samples: 1 - C(n-c,k)/C(n,k).

    Unbiased for every k <= n. Source: Chen et al. 2021 (arXiv 2107.03374).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def curve(num_samples: int) -> list[int]:
    """The k of pass@k that are reported: powers of 2 below the number of samples, and that number."""
    return sorted({*(2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples), num_samples} - {0})


def bootstrap(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of the values, one per prompt, and the 95 % percentile interval under resampling of the prompts.

    Where all prompts have the same share, resampling sees no spread at all; then it is Wilson's interval. Equal values
    that are no shares are their own interval.
    """
    if not values:
        raise ValueError("An interval needs at least one value.")
    rng, n = random.Random(seed), len(values)
    if min(values) == max(values):
        return wilson(values[0], n) if 0.0 <= values[0] <= 1.0 else Interval(values[0], values[0], values[0])
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(resamples))
    return Interval(sum(values) / n, means[int(0.025 * resamples)], means[min(int(0.975 * resamples), resamples - 1)])


def wilson(share: float, n: int) -> Interval:
    """A share of n trials and its 95 % score interval, which has a width at 0 and 1 too: 84 % to 100 % for 20 of 20.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96. Source: Wilson 1927 (JASA 22:209).
    """
    middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    low, high = ((middle + side) / (1 + Z**2 / n) for side in (-half, half))
    return Interval(share, max(0.0, min(low, share)), min(1.0, max(high, share)))


def summarise(
    greedy_passes: Sequence[bool], sampled_passes: Sequence[Sequence[bool]], lengths: Sequence[int], unscorable: int
) -> Evaluation:
    """An Evaluation of verdicts: one greedy and a list of sampled ones for each prompt."""
    pass_at: dict[int, Interval] = {}
    num_samples = len(sampled_passes[0]) if sampled_passes else 0
    for k in curve(num_samples):
        pass_at[k] = bootstrap([pass_at_k(num_samples, sum(passes), k) for passes in sampled_passes])
    return Evaluation(
        num_prompts=len(greedy_passes),
        greedy=bootstrap([float(p) for p in greedy_passes]),
        sampled=bootstrap([sum(p) / num_samples for p in sampled_passes]) if num_samples else None,
        pass_at=pass_at,
        mean_length=sum(lengths) / len(lengths),
        unscorable=unscorable,
    )


def _mean_reward(rewards: Sequence[Sequence[float | None]]) -> Interval | None:
    """Over prompts, of the mean of each one's rewards that are known; None where no reward is."""
    known = [[r for r in of_prompt if r is not None] for of_prompt in rewards]
    means = [sum(of_prompt) / len(of_prompt) for of_prompt in known if of_prompt]
    return bootstrap(means) if means else None


Generate = Callable[[Sequence[Any], int, bool], list[tuple[str, list[int]]]]
Judged = tuple[list[float | None], list[float | None]]  # the scores that decide a pass, and the rewards
Verdicts = Callable[[Sequence[Any], Sequence[str], Sequence[list[int]]], Judged]
Readings = Callable[
    [Sequence[Any], Sequence[str], Sequence[list[int]], list[float | None]], dict[str, list[float | None]]
]


def evaluate(
    prompts: Sequence[Any],
    generate: Generate,
    score: Verdicts,
    *,
    num_samples: int,
    threshold: float,
    readings: Readings | None = None,
) -> Evaluation:
    """Greedy and sampled answers to held-out prompts.

    Args:
        prompts: `Prompt`s. generate: (prompts, samples each, greedy?) -> text and ids, prompt by prompt.
        score: of each completion the score that decides a pass, and the whole reward; None = could not be scored, which
            is no pass.
        num_samples: sampled answers a prompt; 0 = greedy only.
        threshold: a completion passes from this score on.
        readings: the strict and the lenient scores of the greedy completions, given those that decide a pass.
    """

    def passed(values: Sequence[float | None]) -> list[bool]:
        return [v is not None and v >= threshold for v in values]

    def scores(some: Sequence[Any], answers: list[tuple[str, list[int]]]) -> Judged:
        return score(some, [text for text, _ in answers], [ids for _, ids in answers])

    answers = generate(prompts, 1, True)
    greedy, rewards = scores(prompts, answers)
    verdicts, unscorable = passed(greedy), sum(v is None for v in greedy)
    sampled: list[list[bool]] = []
    deciding, of_samples = list(greedy), []
    if num_samples:
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        decided, rewarded = scores(repeated, generate(prompts, num_samples, False))
        starts = range(0, len(decided), num_samples)
        sampled = [passed(decided[i : i + num_samples]) for i in starts]
        of_samples = [rewarded[i : i + num_samples] for i in starts]
        deciding += decided
    result = summarise(verdicts, sampled, [len(ids) for _, ids in answers], unscorable)
    result.reward, result.sampled_reward = _mean_reward([[r] for r in rewards]), _mean_reward(of_samples)
    known = {v for v in deciding if v is not None}
    result.threshold, result.highest = threshold, max(known) if len(known) > 1 else None
    reported = readings(prompts, [text for text, _ in answers], [ids for _, ids in answers], greedy) if readings else {}
    for name, values in reported.items():
        setattr(result, name, bootstrap([float(p) for p in passed(values)]))
    result.examples = [
        {"prompt": prompt.text, "completion": text, "passed": passed}
        | ({"messages": prompt.messages} if prompt.messages else {})
        for prompt, (text, _), passed in zip(prompts, answers, verdicts, strict=True)
    ]
    return result
