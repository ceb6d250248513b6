"""Transformers model, sampler, advantages and update together, against the gradient summed over every completion."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.learner.update import Updater
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key

VOCABULARY, EOS, PAD, LONGEST, GROUP = 6, 1, 0, 3, 4
PROMPT = (2, 3)
BATCHES, GROUPS = 40, 448
# Two ordinary settings: the whole softmax, and a tempered and cut one.
DISTRIBUTIONS = [
    SamplingParams(max_completion_length=LONGEST),
    SamplingParams(0.7, top_k=4, max_completion_length=LONGEST),
]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return AutoModelForCausalLM.from_config(config)


def completions() -> list[tuple[int, ...]]:
    """Every completion: any tokens up to an EOS, or LONGEST tokens without one."""
    others = [t for t in range(VOCABULARY) if t != EOS]
    ended = [(*head, EOS) for n in range(LONGEST) for head in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=LONGEST))


def reward(completion: tuple[int, ...]) -> float:
    """Counts one token, likes to end early, and has an arbitrary part that no token explains alone."""
    arbitrary = ((7 * sum((i + 1) * t * t for i, t in enumerate(completion))) % 11) / 22
    return completion.count(4) + 0.5 * (EOS in completion) + arbitrary - 0.5


def rollouts_of(rows: list[tuple[int, ...]], group: int, logp_BT: torch.Tensor | None = None) -> TextRollouts:
    tokens_BT = torch.tensor([[*row, *[PAD] * (LONGEST - len(row))] for row in rows])
    mask_BT = torch.arange(LONGEST) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return TextRollouts.of_scored_text(
        mask_BT=mask_BT,
        logp_BT=torch.zeros(mask_BT.shape) if logp_BT is None else logp_BT,
        group_B=torch.arange(len(rows)) // group,
        reward_B=torch.tensor([reward(row) for row in rows]),
        tokens_BT=tokens_BT,
        prompt_ids_B=[PROMPT] * len(rows),
    )


def flat_gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in policy.parameters()])


def exact_gradient(model: Any, params: SamplingParams) -> torch.Tensor:
    """∇ Σ_y π(y) R(y), every completion of the support once."""
    policy = Policy(model, params=params, pad_id=PAD)
    model.zero_grad()
    rows = completions()
    with torch.no_grad():  # which tokens the filters leave, token by token
        kept = []
        for row in rows:
            logits = model(torch.tensor([[*PROMPT, *row]])).logits[0, len(PROMPT) - 1 : -1]
            warped = params.warp(logits)
            kept.append(all(warped[t, token] > -torch.inf for t, token in enumerate(row)))
    rows = [row for row, inside in zip(rows, kept, strict=True) if inside]
    logp_BT = policy.forward(rollouts_of(rows, 1)).logp_BT
    probability_B = logp_BT.sum(1).exp()
    assert float(probability_B.detach().sum()) == pytest.approx(1.0, abs=1e-5)
    (probability_B * torch.tensor([reward(row) for row in rows])).sum().backward()
    return flat_gradient(policy)


def sampled_gradients(model: Any, name: str, params: SamplingParams, batches: int = BATCHES) -> torch.Tensor:
    """The update (the descent direction negated) of each of `batches` steps at the same weights."""
    policy = Policy(model, params=params, pad_id=PAD)
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    sampler = NativeSampler(model, tokenizer, [EOS])
    row = dataclasses.replace(ALGORITHMS[name], surrogate="clip")
    algorithm = Algorithm(row, LONGEST)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    rows = GROUPS * GROUP
    updater = Updater(policy, algorithm, optimizer, scheduler, micro_rows=rows, max_grad_norm=0.0)
    out = []
    for step in range(batches):
        done = sampler.sample([PROMPT] * GROUPS, GROUP, params, stream_key(5, step, torch.arange(rows)))
        texts = [tuple(t[m].tolist()) for t, m in zip(done.tokens_BT, done.mask_BT, strict=True)]
        logp_BT = torch.nn.functional.pad(done.logp_BT, (0, LONGEST - done.logp_BT.shape[1]))
        updater.update(
            algorithm.compute_advantages(rollouts_of(texts, GROUP, logp_BT)), torch.arange(rows).unsqueeze(0)
        )
        out.append(-flat_gradient(policy))
    return torch.stack(out)


# The scale of a row whose expected update is the gradient but for a number.
SCALES = {"reinforce": 1.0, "rloo": 1.0, "dr_grpo": (GROUP - 1) / GROUP / LONGEST}


@pytest.mark.parametrize(
    "name, params",
    [
        ("rloo", DISTRIBUTIONS[0]),
        ("rloo", DISTRIBUTIONS[1]),
        pytest.param("reinforce", DISTRIBUTIONS[0], marks=pytest.mark.slow),  # twice the samples for the same path
        pytest.param("dr_grpo", DISTRIBUTIONS[1], marks=pytest.mark.slow),
    ],
    ids=["rloo", "rloo-temperature-top-k", "reinforce", "dr_grpo-temperature-top-k"],
)
def test_sampled_gradients_of_a_real_model_average_to_the_enumerated_one(
    name: str, params: SamplingParams, model: Any
) -> None:
    expected = SCALES[name] * exact_gradient(model, params)
    samples = sampled_gradients(model, name, params, BATCHES if name == "rloo" else 2 * BATCHES)
    directions = torch.randn(20, len(expected), generator=torch.Generator().manual_seed(0))
    projected = samples @ directions.T
    error = projected.std(0) / len(samples) ** 0.5
    assert ((projected.mean(0) - directions @ expected).abs() < 4 * error).all()
    # Along the gradient itself the test has the power to see a bias of 5 %.
    along = samples @ expected / expected.norm()
    assert float(along.std()) / len(samples) ** 0.5 < 0.05 / 4 * float(expected.norm())
    assert abs(float(along.mean() / expected.norm()) - 1) < 0.05


def test_the_same_comparison_catches_an_end_token_left_out_of_the_loss(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = DISTRIBUTIONS[0]
    expected = exact_gradient(model, params)
    original = Algorithm.compute_advantages

    def without_eos(self: Algorithm, rollouts: TextRollouts, **options: Any) -> Any:
        batch = original(self, rollouts, **options)
        assert rollouts.tokens_BT is not None
        batch.mask_BT = batch.mask_BT & (rollouts.tokens_BT != EOS)
        return batch

    monkeypatch.setattr(Algorithm, "compute_advantages", without_eos)
    samples = sampled_gradients(model, "rloo", params, 10)
    directions = torch.randn(20, len(expected), generator=torch.Generator().manual_seed(0))
    projected = samples @ directions.T
    error = projected.std(0) / len(samples) ** 0.5
    assert ((projected.mean(0) - directions @ expected).abs() > 4 * error).any()


def test_a_temperature_that_the_trainer_forgets_is_caught(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = DISTRIBUTIONS[1]
    expected = exact_gradient(model, params)
    original = Policy.__init__

    def forgets(self: Policy, model: Any, *, params: SamplingParams, **options: Any) -> None:
        original(self, model, params=SamplingParams(max_completion_length=LONGEST), **options)

    monkeypatch.setattr(Policy, "__init__", forgets)
    samples = sampled_gradients(model, "rloo", params, 10)
    directions = torch.randn(20, len(expected), generator=torch.Generator().manual_seed(0))
    projected = samples @ directions.T
    error = projected.std(0) / len(samples) ** 0.5
    assert ((projected.mean(0) - directions @ expected).abs() > 4 * error).any()
