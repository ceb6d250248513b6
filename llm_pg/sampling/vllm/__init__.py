"""vLLM as the engine: completions from its servers, or from vLLM in this process, and weights to them."""

from .engine import VllmSampler
from .errors import EngineError

__all__ = ["EngineError", "VllmSampler"]
