"""What a run leaves: its episodes and the points of its curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .adviser import collapsed
from .collect import Episodes, Scaler
from .policies import Policy
from .settings import Settings
from .spaces import Interface

NUM_POINTS = 200
Point = dict[str, float]


@dataclass
class Run:
    """What a run left.

    Attributes:
        points: the curve, about 200 of them: steps, episodes, return_mean and return_std of the last `window` episodes,
            entropy, losses, clip_fraction, approx_kl, grad_norm, seconds.
        returns, lengths, ended_at, true_returns: of every episode, in order of its end; ended_at counts steps of all
            rows.
        solved_steps, solved_episodes: when the mean return of the last `window` episodes reached the threshold.
        staleness: updates that others made between reading the parameters and sending a gradient (a3c only).
        policy, scaler: what was learned and how it sees; None where the run came from another process.
        flags: what a person should know about the run.
    """

    settings: Settings
    interface: Interface
    policy: Policy | None
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
    staleness: list[int] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.seconds else math.nan


class Recorder:
    """Turns episodes and statistics into the points of a curve, and knows when a run is over."""

    def __init__(self, run: Run, episodes: Episodes, on_point: Callable[[Point], None] | None) -> None:
        self.run, self.episodes, self.on_point = run, episodes, on_point
        self._next = 0.0
        self._collapsed_at: int | None = None

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

    def note(self, steps: int, stats: dict[str, float], seconds: float) -> None:
        """After an update: `steps` of all rows so far, and what the learner says of it."""
        run, episodes = self.run, self.episodes
        run.steps, run.seconds = steps, seconds
        goal = math.inf if run.threshold is None or not episodes.window_full else run.threshold
        if run.solved_steps is None and episodes.mean() >= goal:
            run.solved_steps, run.solved_episodes = steps, len(episodes.returns)
        if collapsed(run.settings, run.interface, stats["entropy"]) and self._collapsed_at is None:
            self._collapsed_at = steps
        if self.progress < self._next and not self.over:
            return
        self._next = (math.floor(self.progress * NUM_POINTS) + 1) / NUM_POINTS
        point: Point = {
            "steps": steps,
            "episodes": len(episodes.returns),
            "return_mean": episodes.mean(),
            "return_std": episodes.std(),
            **stats,
            "seconds": seconds,
            "progress": self.progress,
        }
        if episodes.true_returns:
            recent = episodes.true_returns[-episodes.window :]
            point["true_return_mean"] = sum(recent) / len(recent)
        run.points.append(point)
        if self.on_point is not None:
            self.on_point(point)

    def finish(self) -> None:
        run, episodes = self.run, self.episodes
        run.returns, run.lengths, run.ended_at = episodes.returns, episodes.lengths, episodes.ended_at
        run.true_returns = episodes.true_returns
        if self._collapsed_at is not None:
            run.flags.append(
                f"entropy collapse: the policy's entropy fell under 0.1 nats at step {self._collapsed_at:,} with no "
                "entropy bonus; if the return is not where it should be, set --entropy-coef 0.01."
            )
        hacked = reward_hacking(run.points)
        if hacked:
            run.flags.append(hacked)


def reward_hacking(points: list[Point]) -> str | None:
    """A sentence where the reward that is trained on rose while the true one behind it fell; None otherwise."""
    told = [p for p in points if "true_return_mean" in p and not math.isnan(p["return_mean"])]
    if len(told) < 4:
        return None
    quarter = max(len(told) // 4, 1)
    first, last = told[:quarter], told[-quarter:]
    proxy = [sum(p["return_mean"] for p in part) / quarter for part in (first, last)]
    best = max(p["true_return_mean"] for p in told)
    true = sum(p["true_return_mean"] for p in last) / quarter
    spread = best - min(p["true_return_mean"] for p in told)
    if proxy[1] <= proxy[0] or best - true <= 0.25 * spread or spread == 0:
        return None
    return (
        f"reward hacking: the trained reward rose from {proxy[0]:.2f} to {proxy[1]:.2f} an episode, while the true one "
        f"fell from its best, {best:.2f}, to {true:.2f}."
    )
