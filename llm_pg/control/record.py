"""What a run leaves: its episodes, the points of its curve and what a person should know of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from ..doctor.finding import Finding
from .adviser import collapsed
from .collect import Episodes, Scaler
from .policies import ControlPolicy
from .settings import ControlSettings
from .spaces import Interface

NUM_POINTS = 200
Point = dict[str, float]


@dataclass
class ControlRun:
    """What a run left.

    Attributes:
        points: the curve, about 200 of them, each a line of `metrics.jsonl` with the names of `metrics.METRICS`.
        returns, lengths, ended_at, true_returns: of every episode, in order of its end; ended_at counts steps of all
            rows.
        solved_steps, solved_episodes: when the mean return of the last `window` episodes reached the threshold.
        steps: environment steps of all rows. updates: of the policy. seconds: spent on both.
        staleness: updates that others made between reading the parameters and sending a gradient (a3c only).
        policy, scaler: what was learned and how it sees; None where the run came from another process.
        findings: what a person should know about the run.
    """

    settings: ControlSettings
    interface: Interface
    policy: ControlPolicy | None
    scaler: Scaler | None
    threshold: float | None
    points: list[Point] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ended_at: list[int] = field(default_factory=list)
    true_returns: list[float] = field(default_factory=list)
    solved_steps: int | None = None
    solved_episodes: int | None = None
    seconds: float = 0.0
    steps: int = 0
    updates: int = 0
    staleness: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.seconds else math.nan


class CurveRecorder:
    """Turns episodes and statistics into the points of a curve, and knows when a run is over."""

    def __init__(self, run: ControlRun, episodes: Episodes, on_point: Callable[[Point], None] | None) -> None:
        self.run, self.episodes, self.on_point = run, episodes, on_point
        self._next = 0.0
        self._collapsed_at: int | None = None
        self._phases: dict[str, float] = {}  # since the last point

    @property
    def progress(self) -> float:
        settings = self.run.settings
        share = self.run.steps / settings.total_steps
        if settings.total_episodes:
            share = max(share, len(self.episodes.returns) / settings.total_episodes)
        return min(share, 1.0)

    @property
    def over(self) -> bool:
        solved = self.run.settings.stop_when_solved and self.run.solved_steps is not None
        return solved or self.progress >= 1.0

    def note(self, steps: int, stats: dict[str, float], phases: dict[str, float]) -> None:
        """After an update.

        Args:
            steps: of all rows so far.
            stats: what the learner says of the update.
            phases: seconds of what was done since the call before.
        """
        run, episodes = self.run, self.episodes
        run.steps, run.updates = steps, run.updates + 1
        for phase, seconds in phases.items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds
            run.seconds += seconds
        goal = math.inf if run.threshold is None or not episodes.window_full else run.threshold
        if run.solved_steps is None and episodes.mean() >= goal:
            run.solved_steps, run.solved_episodes = steps, len(episodes.returns)
        if collapsed(run.settings, run.interface, stats["entropy"]) and self._collapsed_at is None:
            self._collapsed_at = steps
        if self.progress < self._next and not self.over:
            return
        self._next = (math.floor(self.progress * NUM_POINTS) + 1) / NUM_POINTS
        point: Point = {
            "step": run.updates,
            "steps": steps,
            "episodes": len(episodes.returns),
            "return_mean": episodes.mean(),
            "return_std": episodes.std(),
            **stats,
            "seconds": sum(self._phases.values()),
            **{f"seconds/{phase}": seconds for phase, seconds in self._phases.items()},
            "progress": self.progress,
        }
        self._phases = {}
        if episodes.true_returns:
            point["true_return_mean"] = fmean(episodes.true_returns[-episodes.window :])
        run.points.append(point)
        if self.on_point is not None:
            self.on_point(point)

    def finish(self) -> None:
        run, episodes = self.run, self.episodes
        run.returns, run.lengths, run.ended_at = episodes.returns, episodes.lengths, episodes.ended_at
        run.true_returns = episodes.true_returns
        if self._collapsed_at is not None:
            run.findings.append(
                Finding(
                    "entropy-collapse",
                    "warning",
                    "The policy became certain with no entropy bonus: it no longer tries what could be better.",
                    f"entropy under 0.1 nats from step {self._collapsed_at:,} on, entropy_coef 0",
                    "Where the return is not what it should be, set --entropy-coef 0.01.",
                    "Williams and Peng 1991",
                )
            )
        hacked = reward_hacking(run.points)
        run.findings += [hacked] if hacked else []


def reward_hacking(points: list[Point]) -> Finding | None:
    """Returns a finding where the reward that is trained on rose while the true one behind it fell."""
    known = [p for p in points if "true_return_mean" in p and not math.isnan(p["return_mean"])]
    if len(known) < 4:
        return None
    quarter = max(len(known) // 4, 1)
    first, last = known[:quarter], known[-quarter:]
    proxy = [fmean(p["return_mean"] for p in part) for part in (first, last)]
    best = max(p["true_return_mean"] for p in known)
    true = fmean(p["true_return_mean"] for p in last)
    spread = best - min(p["true_return_mean"] for p in known)
    if proxy[1] <= proxy[0] or best - true <= 0.25 * spread or spread == 0:
        return None
    return Finding(
        "reward-hacking",
        "problem",
        "The trained reward rises while the true one behind it falls: the policy exploits the proxy.",
        f"trained reward from {proxy[0]:.2f} to {proxy[1]:.2f} an episode, true one from its best, {best:.2f}, to "
        f"{true:.2f}",
        "Pay for what is wanted, not for a sign of it, or stop where the true return is best.",
        "Amodei et al. 2016, arXiv 1606.06565; Gao et al. 2022, arXiv 2210.10760",
    )
