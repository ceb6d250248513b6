"""Policy-gradient fine-tuning of causal language models on verifiable rewards.

Trainers with configs, as users of TRL write them (`GRPOTrainer`, `GRPOConfig`, ...), and the pieces that they are made
of, for a loop of your own (`Policy`, `Prompts`, `Sampler`, `Scorer`, `Algorithm`, `Learner`; docs/own-loop.md).

Letters that name axes throughout the package: B rollouts, T completion tokens (or control steps), P prompts,
G samples per prompt, V vocabulary, H hidden.

The package is lazy: `import llm_pg` imports no torch; a name is imported when it is first used.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from .algorithms.algorithm import Algorithm as Algorithm
    from .algorithms.registry import register_algorithm as register_algorithm
    from .config import ActorCriticConfig as ActorCriticConfig
    from .config import Config as Config
    from .config import GRPOConfig as GRPOConfig
    from .config import ReinforceConfig as ReinforceConfig
    from .config import RLOOConfig as RLOOConfig
    from .from_trl.parser import TrlParser as TrlParser
    from .from_trl.trainers import ActorCriticTrainer as ActorCriticTrainer
    from .from_trl.trainers import GRPOTrainer as GRPOTrainer
    from .from_trl.trainers import PolicyGradientTrainer as PolicyGradientTrainer
    from .from_trl.trainers import ReinforceTrainer as ReinforceTrainer
    from .from_trl.trainers import RLOOTrainer as RLOOTrainer
    from .learner.learner import Learner as Learner
    from .model.policy import Policy as Policy
    from .model.teacher import Teacher as Teacher
    from .prompts import Prompts as Prompts
    from .rewards import Scorer as Scorer
    from .rollout.sampler import Sampler as Sampler
    from .trainer import Trainer as Trainer

__version__ = "0.1.0"

_LAZY_IMPORTS = {
    "Trainer": "llm_pg.trainer",
    "PolicyGradientTrainer": "llm_pg.from_trl.trainers",
    "ReinforceTrainer": "llm_pg.from_trl.trainers",
    "RLOOTrainer": "llm_pg.from_trl.trainers",
    "GRPOTrainer": "llm_pg.from_trl.trainers",
    "ActorCriticTrainer": "llm_pg.from_trl.trainers",
    "ReinforceConfig": "llm_pg.config",
    "RLOOConfig": "llm_pg.config",
    "GRPOConfig": "llm_pg.config",
    "ActorCriticConfig": "llm_pg.config",
    "Config": "llm_pg.config",
    "register_algorithm": "llm_pg.algorithms.registry",
    "Policy": "llm_pg.model.policy",
    "Teacher": "llm_pg.model.teacher",
    "Prompts": "llm_pg.prompts",
    "Sampler": "llm_pg.rollout.sampler",
    "Scorer": "llm_pg.rewards",
    "Algorithm": "llm_pg.algorithms.algorithm",
    "Learner": "llm_pg.learner.learner",
    "TrlParser": "llm_pg.from_trl.parser",
}
# What scripts import from trl beside trainers and configs, as it is there.
_OF_TRL = (
    *("ModelConfig", "ScriptArguments", "DatasetMixtureConfig", "get_dataset"),
    *("get_peft_config", "get_quantization_config"),
)

__all__ = ["__version__", *_LAZY_IMPORTS]


def __getattr__(name: str) -> Any:
    if name in _LAZY_IMPORTS:
        # tqdm says so to everybody in a notebook without ipywidgets, where no bar of it is drawn.
        warnings.filterwarnings("ignore", message="IProgress not found")
        return getattr(import_module(_LAZY_IMPORTS[name]), name)
    if name in _OF_TRL:
        return getattr(import_module("trl"), name)
    raise AttributeError(f"module 'llm_pg' has no attribute {name!r}; it has {', '.join(sorted(_LAZY_IMPORTS))}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_IMPORTS})
