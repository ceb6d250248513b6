"""Find reward functions, run them in processes that can be killed, and add up what they say.

`resolve` turns what a user writes into a checked function; `Scorer` scores batches; `Scores` is the answer, in which
None means "could not be scored" and is never a 0. The forms a function may have are in `llm_pg.rewards.contract`.
"""

from llm_pg.rewards.resolve import RewardFunction, resolve, resolve_all
from llm_pg.rewards.scorer import Scorer
from llm_pg.rewards.tally import RewardError, Scores

__all__ = ["RewardError", "RewardFunction", "Scorer", "Scores", "resolve", "resolve_all"]
