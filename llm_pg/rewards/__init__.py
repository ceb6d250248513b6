"""Find reward functions, run them in processes that can be killed, and add up what they say.

`resolve` turns what a user writes into a checked function; `Scorer` scores batches; `Scores` is the answer, in which
None means "could not be scored" and is never a 0. The forms a function may have are in `llm_pg.rewards.contract`.

The package is lazy, since each worker process imports it and needs few of its modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_pg.rewards.audit.probes import ProbeFinding, probe_rewards
    from llm_pg.rewards.audit.tables import Audit
    from llm_pg.rewards.audit.tries import audit_rewards
    from llm_pg.rewards.scorer import Scorer
    from llm_pg.rewards.specs import RewardFunction, resolve, resolve_all
    from llm_pg.rewards.tally import RewardError, Scores

_HOMES = {
    "Audit": "audit.tables",
    "ProbeFinding": "audit.probes",
    "RewardError": "tally",
    "RewardFunction": "specs",
    "Scorer": "scorer",
    "Scores": "tally",
    "audit_rewards": "audit.tries",
    "probe_rewards": "audit.probes",
    "resolve": "specs",
    "resolve_all": "specs",
}

__all__ = [
    "Audit",
    "ProbeFinding",
    "RewardError",
    "RewardFunction",
    "Scorer",
    "Scores",
    "audit_rewards",
    "probe_rewards",
    "resolve",
    "resolve_all",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"llm_pg.rewards.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'llm_pg.rewards' has no attribute {name!r}; it has {', '.join(__all__)}.")
