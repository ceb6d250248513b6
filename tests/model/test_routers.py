"""The load-balancing loss of a mixture of experts is that of the whole step, however the step is cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config import ConfigError
from llm_pg.learner.update import Updater
from llm_pg.metrics import read_metrics
from llm_pg.model.policy import Policy
from llm_pg.model.routers import RouterLoss, router_loss
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.protocol import SamplingParams
from tests.model.test_policy import rollouts

TINY = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.5},
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"model_type": "qwen2_moe", **MOE, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": {"model_type": "qwen3_moe", **MOE, "head_dim": 8},
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral with windows, grouped": {
        "model_type": "mixtral",
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    },
}
COEF = 0.3


@pytest.fixture
def make(tokenizer: Any) -> Callable[..., Any]:
    def model(kind: str, **changes: Any) -> Any:
        from llm_pg.config.schema import ModelConfig
        from llm_pg.model.loading import load_model

        sizes = {**TINY, "router_aux_loss_coef": COEF, **KINDS[kind], **changes}
        return load_model(ModelConfig(make=sizes), tokenizer, seed=0)

    return model


def gradient(
    model: Any, batch: TextRollouts, micro_rows: int, packing: str = "auto", coef: float | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """Of one step, as one vector, and its statistics."""
    policy = Policy(model, params=SamplingParams(), pad_id=0, packing=packing, router_aux_loss_coef=coef)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    parts = (policy, Algorithm(ALGORITHMS["grpo"], 7), optimizer, scheduler)
    made = Updater(*parts, micro_rows=micro_rows, max_grad_norm=0.0)
    (stats,) = made.update(made.algorithm.compute_advantages(batch), torch.arange(len(batch.mask_BT)).unsqueeze(0))
    return vector([p.grad for p in model.parameters()], model), stats.values


def vector(slopes: Any, model: Any) -> torch.Tensor:
    pairs = zip(slopes, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.detach().clone()).flatten() for g, p in pairs])


def whole_loss(model: Any, batch: TextRollouts) -> torch.Tensor:
    """By another road: transformers' own loss of all rows at once, less the last token of each."""
    rows = [[*p, *c] for p, c in zip(batch.prompt_ids_B, batch.completion_ids(), strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * (len(row) - 1) + [0] * (width - len(row) + 1) for row in rows])
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    return loss


@pytest.mark.parametrize("packing", ["auto", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_transformers_loss_of_the_whole_step_however_it_is_cut(
    kind: str, packing: str, make: Callable[..., Any]
) -> None:
    model, batch = make(kind), rollouts()
    without, values = gradient(model, batch, 6, packing, coef=0.0)
    assert "aux_loss" not in values
    model.zero_grad()
    model.eval()
    expected = whole_loss(model, batch)
    slopes = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    wanted = vector(slopes, model)
    assert wanted.abs().max() > 1e-3
    for micro_rows in (6, 4, 1):
        whole, values = gradient(model, batch, micro_rows, packing)
        torch.testing.assert_close(whole - without, COEF * wanted, rtol=1e-3, atol=2e-6)
        assert values["aux_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_loss_of_each_piece_by_itself_would_be_another(make: Callable[..., Any]) -> None:
    """What the counts of the whole step are for: a mean of the pieces' own losses is not the step's."""
    model, batch = make("mixtral").eval(), rollouts()
    pieces = [whole_loss(model, batch.rows(torch.tensor([i]))) for i in range(6)]
    assert abs(float(torch.stack(pieces).mean() - whole_loss(model, batch))) > 1e-3


@pytest.mark.parametrize("micro_rows, more", [(6, 0), (2, 3)])
def test_a_step_of_one_pass_needs_no_other_to_count(micro_rows: int, more: int, make: Callable[..., Any]) -> None:
    model, calls = make("mixtral"), []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    gradient(model, rollouts(), micro_rows, "padded", coef=0.0)
    without, trial = len(calls), 2
    gradient(model, rollouts(), micro_rows, "padded")
    assert len(calls) - without == without + trial + more


def test_rows_of_weight_zero_are_in_no_part_of_it(make: Callable[..., Any]) -> None:
    model, batch = make("mixtral"), rollouts()
    batch.reward_BT[batch.group_B == 1] = 0.0  # equal rewards: no advantage
    _, values = gradient(model, batch, 2)
    model.eval()
    others = batch.rows((batch.group_B != 1).nonzero()[:, 0])
    assert values["aux_loss"] == pytest.approx(float(whole_loss(model, others)), rel=1e-4)


def test_a_model_without_experts_has_none_and_a_weight_for_it_is_refused(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    assert router_loss(make_model("llama")) is None
    with pytest.raises(ConfigError, match="LlamaForCausalLM is no mixture of experts"):
        train(make_model("llama"), tokenizer, tmp_path, router_aux_loss_coef=0.1)


def test_a_loss_that_is_computed_otherwise_is_named_and_not_trained(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral import modeling_mixtral

    own = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *a, **k: 2 * own(*a, **k))
    model = make("mixtral")
    assert "computes another such loss" in str(router_loss(model))
    with pytest.warns(UserWarning, match="of the router is not trained: MixtralForCausalLM computes another"):
        policy = Policy(model, params=SamplingParams(), pad_id=0)
    assert policy.routers is None


def letters(completion: Any, **row: Any) -> float:
    return sum(ord(c) for c in completion) % 97 / 97


def train(model: Any, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    small = {
        **{"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 5, "beta": 0.05},
        **{"num_eval_prompts": 0, "use_cpu": True, "run_name": "r", "reward_in_process": True, "report_seconds": 0},
        **{"learning_rate": 1e-2, "noise_steps": 2},
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=letters,
        args=GRPOConfig(str(folder), **{**small, **changes}),
        train_dataset=[{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)],
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changes", [{}, {"steps_per_generation": 2, "num_iterations": 2}, {"gradient_checkpointing": True}]
)
def test_a_run_balances_the_experts_as_the_config_of_the_model_says(
    changes: dict[str, Any], make: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    for coef in (0.0, 30.0):
        model = make("mixtral", router_aux_loss_coef=coef)
        model.model.embed_tokens.weight.data += 2.0
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[0] += 0.2  # the first expert is chosen for nearly every token
        trainer = train(model, tokenizer, tmp_path, max_steps=8, run_name=f"r{coef}", **changes)
        lines = read_metrics(trainer.folder.metrics)
        assert all(("aux_loss" in line) == bool(coef) for line in lines)
        assert all(line["sampler_gap"] < 1e-5 for line in lines)
        assert not model.config.output_router_logits
    losses = [line["aux_loss"] for line in lines]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.1, losses


def test_what_the_trial_makes_is_read_off_the_model(make: Callable[..., Any]) -> None:
    made = router_loss(make("qwen3_moe"))
    assert isinstance(made, RouterLoss)
    assert (made.coef, made.top_k, made.num_experts) == (COEF, 2, 4)
