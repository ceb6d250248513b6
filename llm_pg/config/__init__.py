"""The run's configuration: typed, closed, documented per field. Importing it imports no torch."""

from .flat import GRPOConfig, ReinforceConfig, RLOOConfig
from .load import ConfigError, load_config, nearest
from .schema import Config

__all__ = ["Config", "ConfigError", "GRPOConfig", "RLOOConfig", "ReinforceConfig", "load_config", "nearest"]
