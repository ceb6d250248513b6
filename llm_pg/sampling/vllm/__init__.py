"""vLLM as the engine: completions from its OpenAI-compatible servers, weights to them by files."""

from .engine import VllmSampler
from .errors import EngineError

__all__ = ["EngineError", "VllmSampler"]
