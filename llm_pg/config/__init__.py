"""The run's configuration: typed, closed, documented per field. Importing it imports no torch."""

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
