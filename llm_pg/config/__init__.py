"""The run's configuration: typed, closed, documented per field. Importing it imports no torch.

What an algorithm reads (beta, epsilon, ...) is a field of `algorithms/spec.py`, from which `algorithm.py` is made.
"""

from ..words import nearest
from .flat import ActorCriticConfig, GRPOConfig, ReinforceConfig, RLOOConfig
from .load import ConfigError, load_config
from .schema import Config

__all__ = [
    "ActorCriticConfig",
    "Config",
    "ConfigError",
    "GRPOConfig",
    "RLOOConfig",
    "ReinforceConfig",
    "load_config",
    "nearest",
]
