"""A teacher at a vLLM server: log-probabilities of tokens that the policy sampled."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ...config import ConfigError
from ...rollouts import TextRollouts
from .client import Client
from .errors import EngineError, Unreachable
from .pool import ServerPool

AT_ONCE = 32  # requests in flight; the server makes batches of them


class ServedTeacher:
    """A model at a vLLM server (`vllm serve MODEL`), which must have the policy's tokenizer.

    Args:
        url: of the server, such as http://host:8000.
        temperature: of the policy. A server gives log-probabilities at temperature 1 alone.
        timeout: seconds for a request.

    Raises:
        ConfigError: another temperature, or nobody answers at this address.
    """

    def __init__(self, url: str, *, temperature: float = 1.0, timeout: float = 240.0) -> None:
        if temperature != 1.0:
            raise ConfigError(
                f"teacher_model_server_url is set and temperature is {temperature:g}: a vLLM server gives the "
                "log-probabilities of prompts at temperature 1. Use temperature=1.0, or a teacher in this process "
                "(teacher_model_name_or_path)."
            )
        try:
            client = Client(url, timeout)
            client.health()
        except (ValueError, Unreachable, EngineError) as error:
            raise ConfigError(
                f"teacher_model_server_url {url!r}: no vLLM server answers there ({error}). Start one with `vllm serve "
                "MODEL --port 8000`, and give its address as http://host:8000."
            ) from None
        self._pool = ServerPool([client], say=lambda line: print(line, file=sys.stderr))

    def logp(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Log-probability of each sampled token, nats, shape (B, T), 0 outside the mask.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: not used; the server makes its own batches.

        Raises:
            EngineError: the server is gone, or answers with what are no log-probabilities of these tokens.
        """
        contexts = rollouts.context_ids()
        rows = [[*prompt, *ids] for prompt, ids in zip(rollouts.prompt_ids_B, contexts, strict=True)]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            every = list(threads.map(self._row, rows))
        logp_BT = torch.zeros_like(rollouts.logp_BT)
        places, lengths = rollouts.place_BT().tolist(), rollouts.length_B.tolist()
        for i, (values, prompt) in enumerate(zip(every, rollouts.prompt_ids_B, strict=True)):
            sampled = [values[len(prompt) + place] for place in places[i][: lengths[i]]]
            logp_BT[i, : lengths[i]] = torch.tensor(sampled, dtype=logp_BT.dtype)
        return logp_BT

    def _row(self, ids: Sequence[int]) -> list[float]:
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        return self._pool.ask("/v1/completions", body, lambda answer: _read(answer, ids))[0]


def _read(answer: Any, ids: Sequence[int]) -> list[float]:
    """The log-probability of each id given those before it; of the first, which has none, NaN."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1:
        raise Unreachable(f"an answer without a completion: {str(answer)[:200]}")
    given = choices[0].get("prompt_logprobs")
    if not isinstance(given, list) or len(given) != len(ids):
        raise EngineError(
            "The teacher's server gave no log-probabilities of the prompt (prompt_logprobs of /v1/completions), or not "
            f"one for each of its {len(ids)} tokens. Is an older vLLM, or another program, at this address?"
        )
    values = [math.nan]
    for token, known in zip(ids[1:], given[1:], strict=True):
        entry = (known or {}).get(str(token))
        value = entry.get("logprob") if isinstance(entry, dict) else None
        if not isinstance(value, (int, float)) or math.isnan(value) or value > 1e-3:
            raise EngineError(
                f"The teacher's server knows no log-probability of token {token}: it has {str(known)[:120]}. It must "
                "serve a model with the policy's tokenizer."
            )
        values.append(max(float(value), -1e4))
    return values
