"""Prints `docs/architectures.md`, or writes it to a file that is named: every causal architecture, tried.

Takes some minutes: each architecture is made tiny, sampled from, trained on for one pass, saved and loaded again.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import tiny_models
import torch
import transformers
from publish import publish
from torch import Tensor

from llm_pg.estimators.distributions import token_logp
from llm_pg.model.loading import character_tokenizer
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingParams
from llm_pg.sampling.random import stream_key

PROMPTS = (tuple(range(5, 14)), tuple(range(20, 51, 2)), (7, 9, 80))
GROUP, AT_ONCE = 4, 8  # the third prompt's rows wait until others have ended
LIMIT = 24  # tokens of a completion: with a prompt more than a window of the tiny models
ENDS = (1, *range(88, 97))
BOUNDS = (3e-6, 1e-5, 1e-4, 1e-3)


@dataclass(frozen=True)
class Row:
    """An architecture: how it is decoded and laid out, and the largest differences in nats a token.

    sampler, trainer: of the log-probabilities recorded and trained from those of the model's own forward on the row
    alone. kl: of the frozen start from the policy before the first step. reloaded: of logits, saved and loaded.
    """

    engine: str
    layout: str
    why: str
    sampler: float
    trainer: float
    kl: float
    reloaded: float


def measured(model: Any) -> Row:
    """Samples from a model, and computes the same tokens by every part that computes them."""
    params = SamplingParams(max_completion_length=LIMIT)
    sampler = NativeSampler(model, character_tokenizer(), ENDS, AT_ONCE)
    keys = stream_key(0, torch.arange(len(PROMPTS)).unsqueeze(1), torch.arange(GROUP)).reshape(-1)
    done = sampler.sample(PROMPTS, GROUP, params, keys)
    policy = Policy(model, params=params, pad_id=0, with_reference=True)
    batch = _rollouts(done)
    scores = policy.forward(batch)
    scores.logp_BT.sum().backward()
    own_BT = torch.zeros_like(done.logp_BT)
    for row in range(len(keys)):
        own_BT[row][done.mask_BT[row]] = _alone(model, PROMPTS[row // GROUP], done.tokens_BT[row][done.mask_BT[row]])
    return Row(
        engine=sampler.choice.name,
        layout=policy.layout.name,
        why=sampler.choice.why or policy.layout.why_padded,
        sampler=_gap(done.logp_BT, own_BT),
        trainer=_gap(scores.logp_BT, own_BT),
        kl=_gap(policy.ref_logp(batch, 99), policy.logp(batch, 99)),
        reloaded=_reloaded(model),
    )


def _rollouts(done: Completions) -> TextRollouts:
    group_B = torch.arange(len(PROMPTS)).repeat_interleave(GROUP)
    return TextRollouts.of_scored_text(
        mask_BT=done.mask_BT,
        logp_BT=done.logp_BT,
        group_B=group_B,
        reward_B=torch.linspace(0, 1, len(group_B)),
        truncated_B=done.truncated_B,
        gamma=1.0,
        tokens_BT=done.tokens_BT,
        prompt_ids_B=[prompt for prompt in PROMPTS for _ in range(GROUP)],
    )


@torch.no_grad()
def _alone(model: Any, prompt: tuple[int, ...], done: Tensor) -> Tensor:
    ids = torch.tensor([[*prompt, *done.tolist()]])
    return token_logp(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1], done)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@torch.no_grad()
def _reloaded(model: Any) -> float:
    ids = torch.arange(5, 25).unsqueeze(0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    logits = (m(input_ids=ids, use_cache=False).logits for m in (model, again))
    return _gap(*logits)


HEAD = """# Architectures

Every causal language model of transformers {version}, made tiny with random weights, in float32. Of encoders and
encoder-decoders this page has nothing. Largest differences in nats a token, over {rows} completions of which some wait
until others have ended: **sampler**, between the log-probability recorded while sampling and that of the model's own
forward on the row alone; **trainer**, between that of a training pass and the same; **reference**, between the frozen
start and the policy before the first step; **reloaded**, between logits before a save and after loading.

- **decoded**: *lean*, Llama's layers written out; *shared*, a prompt's keys kept once for its completions; *cache*, the
  model's own cache, with the states of its layers, computed once a prompt and copied to its rows; *whole rows*, every
  row anew for every token, slow, with a warning before the first step.
- **layout** of a training pass: *packed*, without padding, each prompt once; *grouped*, each prompt once, its
  completions going on from the model's cache; *padded*, a row a completion. On a GPU more models are packed, those with
  windows and soft caps too.

Each way is tried on the model before the first step, and the next one taken where the numbers differ.

| architecture | model_type | decoded | layout | sampler | trainer | reference | reloaded |
|---|---|---|---|---|---|---|---|
"""


def markdown() -> str:
    """The page."""
    lines, whys = [], []
    for name, types in tiny_models.architectures().items():
        row = measured(tiny_models.make(types[-1]))
        gaps = " | ".join([*map(_bounded, (row.sampler, row.trainer)), *map(_exact, (row.kl, row.reloaded))])
        lines.append(f"| {name} | {', '.join(types)} | {row.engine} | {row.layout} | {gaps} |\n")
        if row.why:
            whys.append(f"- {name}: {_plain(row.why)}\n")
    head = HEAD.format(version=".".join(transformers.__version__.split(".")[:2]), rows=GROUP * len(PROMPTS))
    left_out = "".join(f"- {name}: {why}\n" for name, why in tiny_models.LEFT_OUT.items())
    return (
        f"{head}{''.join(lines)}\n## Why not packed or grouped, or not by a cache\n\n{''.join(whys)}\n"
        f"## Left out\n\n{left_out}"
    )


def _bounded(gap: float) -> str:
    """A gap of rounding, which differs from machine to machine."""
    bound = next((bound for bound in BOUNDS if gap <= bound), None)
    return f"{gap:.1g}" if bound is None else f"< {bound:.0e}".replace("e-0", "e-")


def _exact(gap: float) -> str:
    return "0" if gap == 0 else _bounded(gap)


def _plain(why: str) -> str:
    """Without numbers that hang on the machine."""
    return why.partition(" by ")[0] if why.startswith("a trial gave") else why


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    publish(markdown())
