"""Episodes of several turns: the model speaks, an environment answers, and any turn can earn a reward.

    class Game:
        def reset(self, row, seed): self.secret = row["secret"]
        def step(self, text): return Reply("higher", reward=0.0, done=False)

    llm-pg train config.yaml rollout.environment=game.py:Game rollout.max_turns=4

Only the sampled tokens are trained. What the environment says is tokenised once and is between them; what the model
written is never tokenised again.
"""

from .episode import SHIPPED, as_reward_function, make
from .protocol import Environment, Reply

__all__ = ["SHIPPED", "Environment", "Reply", "as_reward_function", "make"]
