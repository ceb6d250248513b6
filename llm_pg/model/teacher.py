"""The teacher of on-policy distillation: another frozen causal LM, which scores the tokens that the policy sampled."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..config import ConfigError
from ..rollouts import TextRollouts
from .distribution import SamplingParams
from .loading import disable_dropout
from .policy import Policy

SHOWN_TOKENS = 3  # of those that differ, in a message


class ScoresTokens(Protocol):
    """What a learner asks of a teacher."""

    def logp(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Log-probability of each sampled token, nats, shape (B, T), 0 outside the mask."""


class Teacher:
    """A frozen model over the same tokens as the policy.

    Its distribution has the policy's temperature and its whole support: a token that top_k or top_p of the policy left
    in, the teacher may still find unlikely.

    Args:
        model: a transformers model, on its device.
        params: the distribution that the policy samples.
        pad_id: filler of unused positions.
        autocast: context in which its forwards run.

    Source: Agarwal et al. 2023 (arXiv 2306.13649); Gu et al. 2023 (arXiv 2306.08543).
    """

    def __init__(
        self, model: Any, *, params: SamplingParams, pad_id: int, autocast: Any = contextlib.nullcontext
    ) -> None:
        disable_dropout(model)
        whole = dataclasses.replace(params, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
        self._scorer = Policy(model.requires_grad_(False), params=whole, pad_id=pad_id, autocast=autocast)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        policy: Policy,
        *,
        revision: str | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> Teacher:
        """Loads a teacher onto the policy's device; its weights stay in the type that they come in.

        Args:
            name: hub id or local folder of a causal LM, or of a PEFT adapter of one.
            policy: what will be taught; its tokenizer must be the teacher's.
            revision: branch, tag or commit of a hub model.
            init_kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`, such as dtype.

        Raises:
            ConfigError: no such model, or one over other tokens.
        """
        if policy.tokenizer is not None:
            check_tokens_of(name, policy.tokenizer, revision)
        options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, **(init_kwargs or {})}
        try:
            model = AutoModelForCausalLM.from_pretrained(name, revision=revision, **options)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"The teacher {str(name)!r} could not be loaded ({' '.join(str(error).split())[:300]}). Give "
                "teacher_model_name_or_path a hub id, or a folder that save_pretrained wrote."
            ) from None
        return cls.of_policy(model, policy)

    @classmethod
    def of_policy(cls, model: Any, policy: Policy) -> Teacher:
        """A model that is loaded already, as the teacher of a policy, moved to its device.

        Args:
            model: a transformers or PEFT model.
            policy: what will be taught.

        Raises:
            ConfigError: it reads fewer tokens than the policy can say.
        """
        rows, own = (each.get_input_embeddings().weight.shape[0] for each in (model, policy.model))
        if rows < (known := own if policy.tokenizer is None else len(policy.tokenizer)):
            raise ConfigError(
                f"The teacher knows {rows} tokens and the policy's tokenizer {known}: a token that one says the other "
                "could not read. Take a teacher with the same tokenizer."
            )
        device = next(policy.model.parameters()).device
        return cls(model.to(device), params=policy.params, pad_id=policy.layout.pad_id, autocast=policy.autocast)

    @property
    def model(self) -> Any:
        """The frozen model."""
        return self._scorer.model

    @torch.no_grad()
    def logp(self, rollouts: TextRollouts, micro_rows: int) -> Tensor:
        """Log-probability of each sampled token, nats, shape (B, T), 0 outside the mask; at least -1e4, where a token
        has no probability at all.

        Args:
            rollouts: scored or unscored rows of text.
            micro_rows: completions in one forward pass; the result does not depend on it.
        """
        return self._scorer.logp(rollouts, micro_rows).clamp(min=-1e4)


def check_tokens_of(name: str | Path, own: Any, revision: str | None = None) -> None:
    """ConfigError where a teacher that is not loaded yet has other tokens than the policy.

    Args:
        name: hub id or folder of the teacher. own: the policy's tokenizer. revision: of a hub model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return  # a folder of weights alone: the size is compared all the same
    check_same_tokens(own, tokenizer)


def check_same_tokens(own: Any, teachers: Any) -> None:
    """ConfigError where a token of the policy is another one, or none, of the teacher.

    Args:
        own: the policy's tokenizer. teachers: that of the teacher.
    """
    known = teachers.get_vocab()
    odd = [(token, i, known.get(token)) for token, i in own.get_vocab().items() if known.get(token) != i]
    if not odd:
        return
    first = sorted(odd, key=lambda each: each[1])[:SHOWN_TOKENS]
    shown = "; ".join(f"{token!r} is {i} and {other}" for token, i, other in first)
    raise ConfigError(
        f"The teacher has another tokenizer: {len(odd)} of the policy's {len(own)} tokens have other ids there, or "
        f"none ({shown}, ids of the policy and the teacher). A teacher scores the policy's own tokens, so it must be "
        "of the same family, such as Qwen2.5-7B-Instruct for Qwen2.5-0.5B."
    )
