"""On the same weights, prompts and completions, loss and gradient are those of TRL 1.16's own trainers.

TRL samples, scores, computes its advantages and its loss with its own code; ours starts from the completions and
rewards it got. Where we differ on purpose, the test says which of the two is exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_pg.algorithms.algorithm import Algorithm, Batch
from llm_pg.algorithms.spec import WORDS, AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.estimators.distributions import entropy, token_logp, warp_logits
from llm_pg.rollouts import Rollouts

GENERATIONS, ROWS, LIMIT = 4, 8, 6
LOGPS = 4  # place of the sampler's log-probabilities in what TRL's `_generate` returns
PROMPTS = ["ab", "cdab"]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Graded, different for nearly every completion, one group with two equal ones."""
    return [((sum(ids) * 7 + len(ids)) % 5) / 4 for ids in completion_ids]


def number_of_tokens(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A second reward, which does not apply to some."""
    return [None if ids[0] % 4 == 0 else float(len(ids)) for ids in completion_ids]


def no_verdict_on_long_ones(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None if sum(ids) % 3 == 0 else r for ids, r in zip(completion_ids, reward(completion_ids), strict=True)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A tiny Llama and its tokenizer, saved: TRL loads its reference from there."""
    from llm_pg.config.schema import ModelConfig
    from llm_pg.model.loading import load_model

    folder = str(tmp_path_factory.mktemp("trl") / "model")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = load_model(ModelConfig(make={"model_type": "llama", **size, "num_key_value_heads": 2}), tokenizer, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclasses.dataclass
class Sampled:
    """What TRL sampled and computed, and the trainer, its weights moved on since."""

    trainer: Any
    inputs: dict[str, Any]
    rewards_B: Tensor
    parts: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def theirs(self) -> tuple[float, Tensor]:
        model = self.trainer.model
        model.zero_grad()
        loss = self.trainer.compute_loss(model, self.inputs)
        loss.backward()
        return float(loss.detach()), _gradient(model)

    def logp(self, model: Any) -> Tensor:
        ids = torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], 1)
        attention = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], 1)
        logits = model(input_ids=ids, attention_mask=attention).logits
        completion = self.inputs["completion_ids"]
        width = completion.shape[1]
        return token_logp(warp_logits(logits[:, -width - 1 : -1]), completion)

    def clipped(self, batch: Batch) -> float:
        """Share of tokens whose ratio is out of bounds on the side that clips, as TRL's default epsilon has it."""
        with torch.no_grad():
            algorithm = Algorithm(dataclasses.replace(ALGORITHMS["rloo"], importance_sampling_level="token"))
            return float(algorithm.loss(self.logp(self.trainer.model), batch)[1]["clip_fraction"])

    def entropy(self, gradient: bool = False) -> Tensor:
        """Of the present weights at each completion token, as TRL measures it."""
        ids = torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], 1)
        attention = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], 1)
        with torch.set_grad_enabled(gradient):
            logits = self.trainer.model(input_ids=ids, attention_mask=attention).logits
        return entropy(logits[:, -self.inputs["completion_ids"].shape[1] - 1 : -1])

    def rollouts(self, proximal_logp_BT: Tensor) -> Rollouts:
        reference = self.trainer.ref_model
        with torch.no_grad():
            ref_logp_BT = None if reference is None else self.logp(reference)
        return Rollouts.of_scored_text(
            mask_BT=self.inputs["completion_mask"],
            logp_BT=self.inputs.get("sampling_per_token_logps", proximal_logp_BT),
            group_B=torch.arange(ROWS) // GENERATIONS,
            reward_B=[None if math.isnan(reward) else reward for reward in self.rewards_B.tolist()],
            ref_logp_BT=ref_logp_BT,
            entropy_BT=self.entropy(),
            **self.parts,
        )

    def ours(self, row: AlgorithmSpec, proximal_logp_BT: Tensor, reused: bool) -> tuple[float, Tensor, Batch]:
        algorithm, model = Algorithm(row, max_completion_length=LIMIT), self.trainer.model
        batch = algorithm.compute_advantages(self.rollouts(proximal_logp_BT))
        if reused:
            batch = dataclasses.replace(batch, proximal_logp_BT=proximal_logp_BT)
        model.zero_grad()
        loss = algorithm.loss(self.logp(model), batch)[0]
        loss.backward()
        return float(loss.detach()), _gradient(model), batch


def _gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def _same(theirs: tuple[float, Tensor], ours: tuple[float, Tensor]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-6)
    assert float((ours[1] - theirs[1]).norm()) < 1e-5 * float(theirs[1].norm())


def as_if_from_vllm(trainer: Any, mismatch: float) -> None:
    """TRL's path for completions of another engine: transformers samples, and each token's log-probability is reported
    off by this size from the one of a uniform choice, which the tiny model's are close to."""
    generate = trainer._generate

    def reported(prompts: list[Any]) -> tuple[Any, ...]:
        trainer.use_vllm = False
        out = list(generate(prompts))
        trainer.use_vllm = True
        generator = torch.Generator().manual_seed(2)
        uniform = -math.log(trainer.model.config.vocab_size)
        lengths = [len(ids) for ids in out[1]]
        out[LOGPS] = [(uniform + mismatch * (torch.randn(n, generator=generator) + 0.3)).tolist() for n in lengths]
        return tuple(out)

    trainer._generate = reported


def scored(function: Any, ids: list[list[int]], weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The rewards of one function, or the weighted sum of several and what each of them said."""
    several = function if isinstance(function, list) else [function]
    values = [[math.nan if value is None else value for value in each(completion_ids=ids)] for each in several]
    part_B = torch.tensor(values).T
    if len(several) == 1:
        return part_B[:, 0], {}
    weight_B = weights.expand_as(part_B)
    return (part_B * weight_B).nansum(1), {"part_reward_B": part_B, "part_weight_B": weight_B}


@pytest.fixture
def sample(checkpoint: str, tmp_path: Path) -> Callable[..., tuple[Sampled, Tensor]]:
    """TRL's trainer after one generation, its weights moved where the data are to be reused."""

    def run(
        kind: str, *, moved: float = 0.0, mismatch: float = 0.0, function: Any = reward, **settings: Any
    ) -> tuple[Sampled, Tensor]:
        import trl
        from datasets import Dataset

        torch.manual_seed(0)
        home = trl if hasattr(trl, f"{kind}Trainer") else import_module(f"trl.experimental.{kind.lower()}")
        trainer_type, config_type = getattr(home, f"{kind}Trainer"), getattr(home, f"{kind}Config")
        arguments = config_type(
            output_dir=str(tmp_path),
            per_device_train_batch_size=ROWS,
            num_generations=GENERATIONS,
            max_completion_length=LIMIT,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            **settings,
        )
        trainer = trainer_type(
            model=checkpoint,
            reward_funcs=function,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        )
        trainer.current_gradient_accumulation_steps = 1
        if mismatch:
            as_if_from_vllm(trainer, mismatch)
        trainer.model.train()
        rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(GENERATIONS)]
        inputs = trainer._generate_and_score_completions(rows)
        ids = [
            row[mask.bool()].tolist()
            for row, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
        ]
        sampled = Sampled(trainer, inputs, *scored(function, ids, trainer.reward_weights))
        with torch.no_grad():
            proximal_logp_BT = sampled.logp(trainer.model)
            generator = torch.Generator().manual_seed(1)
            for p in trainer.model.parameters():
                p.add_(moved * torch.randn(p.shape, generator=generator))
        return sampled, proximal_logp_BT

    return run


def grpo(loss_type: str, scale_rewards: str, beta: float) -> AlgorithmSpec:
    return dataclasses.replace(ALGORITHMS["grpo"], loss_type=loss_type, scale_rewards=scale_rewards, beta=beta)


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_grpo_has_the_loss_and_the_gradient_of_trl(
    sample: Any, loss_type: str, scale_rewards: str, beta: float, num_iterations: int
) -> None:
    sampled, old = sample(
        "GRPO",
        moved=0.02 if num_iterations == 2 else 0.0,
        loss_type=loss_type,
        scale_rewards=scale_rewards,
        beta=beta,
        num_iterations=num_iterations,
    )
    loss, gradient, batch = sampled.ours(grpo(loss_type, scale_rewards, beta), old, reused=num_iterations == 2)
    assert torch.allclose(batch.advantage_BT[:, 0], sampled.inputs["advantages"], rtol=1e-5, atol=1e-6)
    _same(sampled.theirs(), (loss, gradient))
    if num_iterations == 2:
        assert torch.allclose(sampled.inputs["old_per_token_logps"][batch.mask_BT], old[batch.mask_BT], atol=1e-5)
        assert 0 < sampled.clipped(batch) < 1


@pytest.mark.parametrize("moved", [0.0, 0.02])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gspo", {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("sapo", {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}),
        ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("luspo", {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
        ("vespo", {"loss_type": "vespo"}),
        ("grpo", {"loss_type": "dapo", "delta": 1.3}),
    ],
)
def test_its_relatives_have_the_loss_and_the_gradient_of_trl(
    sample: Any, name: str, settings: dict[str, Any], moved: float
) -> None:
    sampled, old = sample("GRPO", moved=moved, num_iterations=2, **settings)
    row = dataclasses.replace(ALGORITHMS[name], delta=settings.get("delta"))
    _same(sampled.theirs(), sampled.ours(row, old, reused=True)[:2])


@pytest.mark.parametrize("moved", [0.0, 0.05])
@pytest.mark.parametrize("widths", [(0.4, 0.4), (0.05, 0.1)])
def test_gmpo_has_the_loss_and_the_gradient_of_trls_experimental_trainer(
    sample: Any, widths: tuple[float, float], moved: float
) -> None:
    settings = dict(zip(("epsilon", "epsilon_high"), widths, strict=True))
    sampled, old = sample("GMPO", moved=moved, num_iterations=2, beta=0.0, **settings)
    _same(sampled.theirs(), sampled.ours(dataclasses.replace(ALGORITHMS["gmpo"], **settings), old, reused=True)[:2])


@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, -0.5]])
def test_several_rewards_are_normalised_one_by_one_as_by_trl(sample: Any, weights: list[float]) -> None:
    settings = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": weights}
    functions = [reward, number_of_tokens]
    sampled, old = sample("GRPO", function=functions, moved=0.02, num_iterations=2, loss_type="dapo", **settings)
    _same(sampled.theirs(), sampled.ours(ALGORITHMS["gdpo"], old, reused=True)[:2])


@pytest.mark.parametrize("target", [0.1, 100.0])
def test_the_adaptive_entropy_bonus_is_trls(sample: Any, target: float) -> None:
    settings = {"entropy_coef": 0.2, "entropy_target": target, "entropy_coef_delta": 0.05}
    sampled, old = sample("GRPO", moved=0.02, num_iterations=2, use_adaptive_entropy=True, **settings)
    row = dataclasses.replace(ALGORITHMS["grpo"], use_adaptive_entropy=True, **settings)
    algorithm, model = Algorithm(row, max_completion_length=LIMIT), sampled.trainer.model
    mask_BT = sampled.inputs["completion_mask"].bool()
    for _ in range(3):
        theirs = sampled.theirs()
        batch = algorithm.compute_advantages(sampled.rollouts(old))
        batch = dataclasses.replace(batch, proximal_logp_BT=old)
        model.zero_grad()
        loss, stats = algorithm.loss(sampled.logp(model), batch, entropy_BT=sampled.entropy(gradient=True))
        loss.backward()
        _same(theirs, (float(loss.detach()), _gradient(model)))
        algorithm.observe_entropy(float(sampled.entropy()[mask_BT].mean()))
        assert algorithm.entropy_bonus is not None
        assert algorithm.entropy_bonus.coef == pytest.approx(sampled.trainer.entropy_coef)
        assert float(stats["entropy"]) == pytest.approx(algorithm.entropy_bonus.entropy, rel=1e-5)


@pytest.mark.parametrize("temperatures", [(0.5, 3.0), (4.0, 1.0)])
def test_sapo_gates_each_sign_by_its_own_temperature_as_trl_does(
    sample: Any, temperatures: tuple[float, float]
) -> None:
    names = ("sapo_temperature_pos", "sapo_temperature_neg")
    settings = dict(zip(names, temperatures, strict=True))
    sampled, old = sample("GRPO", moved=0.05, num_iterations=2, loss_type="sapo", **settings)
    _same(sampled.theirs(), sampled.ours(dataclasses.replace(ALGORITHMS["sapo"], **settings), old, reused=True)[:2])


@pytest.mark.parametrize("moved", [0.0, 0.02])
@pytest.mark.parametrize("bounds", [(None, 1.1), (0.9, 1.2)])
@pytest.mark.parametrize("mode", [m for m in WORDS["vllm_importance_sampling_mode"] if m != "sequence_binary_kl"])
def test_the_correction_for_another_sampler_is_trls(
    sample: Any, mode: str, bounds: tuple[float | None, float], moved: float
) -> None:
    names = ("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max")
    settings: dict[str, Any] = {"vllm_importance_sampling_mode": mode, **dict(zip(names, bounds, strict=True))}
    sampled, old = sample("GRPO", moved=moved, mismatch=0.1, loss_type="dapo", num_iterations=2, **settings)
    row = dataclasses.replace(ALGORITHMS["grpo"], vllm_importance_sampling_correction=True, **settings)
    loss, gradient, batch = sampled.ours(row, old, reused=True)
    _same(sampled.theirs(), (loss, gradient))
    with torch.no_grad():
        met = float(Algorithm(row).loss(sampled.logp(sampled.trainer.model), batch)[1]["correction_bounded"])
    assert 0 < met <= 1
    off = dataclasses.replace(row, vllm_importance_sampling_correction=False)
    assert float((sampled.ours(off, old, reused=True)[1] - gradient).norm()) > 1e-3 * float(gradient.norm())


@pytest.mark.parametrize(("moved", "mismatch"), [(0.05, 0.0), (0.0, 0.5)])
def test_completions_that_the_policy_has_left_are_dropped_as_in_trl(sample: Any, moved: float, mismatch: float) -> None:
    """By the drift from the sampler's log-probabilities, where those are known, as by that of the updates."""
    threshold = 0.002
    settings: dict[str, Any] = {"num_iterations": 2, "off_policy_mask_threshold": threshold}
    if mismatch:
        settings["vllm_importance_sampling_correction"] = False
    sampled, old = sample("GRPO", moved=moved, mismatch=mismatch, loss_type="grpo", **settings)
    row = dataclasses.replace(ALGORITHMS["grpo"], loss_type="grpo", off_policy_mask_threshold=threshold)
    loss, gradient, batch = sampled.ours(row, old, reused=True)
    _same(sampled.theirs(), (loss, gradient))
    with torch.no_grad():
        dropped = float(Algorithm(row).loss(sampled.logp(sampled.trainer.model), batch)[1]["off_policy_masked"])
    assert 0 < dropped < 1


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.83])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_share_of_tokens_of_high_entropy_is_trls(sample: Any, loss_type: str, share: float) -> None:
    """TRL takes the quantile of each micro-batch; here one micro-batch is the whole batch, as it always is in ours."""
    sampled, old = sample("GRPO", loss_type=loss_type, top_entropy_quantile=share)
    row = dataclasses.replace(ALGORITHMS["grpo"], loss_type=loss_type, top_entropy_quantile=share)
    loss, gradient, batch = sampled.ours(row, old, reused=False)
    _same(sampled.theirs(), (loss, gradient))
    every = Algorithm(dataclasses.replace(row, top_entropy_quantile=1.0)).compute_advantages(sampled.rollouts(old))
    assert 0 < int((batch.advantage_BT != 0).sum()) < int((every.advantage_BT != 0).sum())


@pytest.mark.parametrize("moved", [0.0, 0.01])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_rloo_has_the_loss_and_the_gradient_of_trl(sample: Any, beta: float, moved: float) -> None:
    """TRL credits every token with the whole completion's KL; ours, as shipped, with the KL from that token on."""
    sampled, old = sample("RLOO", moved=moved, beta=beta, num_iterations=2)
    row = dataclasses.replace(ALGORITHMS["rloo"], beta=beta, returns="total")
    loss, gradient, batch = sampled.ours(row, old, reused=True)
    assert torch.allclose(batch.advantage_BT[:, 0], sampled.inputs["advantages"], rtol=1e-5, atol=1e-5)
    _same(sampled.theirs(), (loss, gradient))
    assert (0 < sampled.clipped(batch) < 1) == (moved > 0)


def test_rloo_as_shipped_credits_the_kl_to_go_and_both_are_exact(sample: Any) -> None:
    """Exact: both (`llm-pg prove`). Ours has the smaller variance, so it is what ships."""
    shipped = dataclasses.replace(ALGORITHMS["rloo"], beta=0.5)
    sampled, old = sample("RLOO", beta=0.5, num_iterations=2)
    with torch.no_grad():
        for p in sampled.trainer.ref_model.parameters():
            p.mul_(0.9)
    summed = sampled.ours(dataclasses.replace(shipped, returns="total"), old, reused=True)[1]
    to_go = sampled.ours(shipped, old, reused=True)[1]
    assert float((summed - to_go).norm()) > 1e-3 * float(summed.norm())
    from llm_pg.prove.measure import measure
    from llm_pg.prove.worlds import WorldSpec

    far = WorldSpec(rewards="none", reference="far")
    ours, theirs = (measure(dataclasses.replace(shipped, returns=r), far)[0] for r in ("reward_to_go", "total"))
    assert max(ours.bias, theirs.bias) < 1e-10
    assert ours.noise < theirs.noise


def test_rloo_with_normalised_advantages_has_trls_weights(sample: Any) -> None:
    """TRL's `normalize_advantages` is ours over rollouts, of the leave-one-out advantages."""
    sampled, old = sample("RLOO", num_iterations=2, normalize_advantages=True)
    row = dataclasses.replace(ALGORITHMS["rloo"], returns="total", normalize_advantages="rollouts")
    loss, gradient, _ = sampled.ours(row, old, reused=True)
    _same(sampled.theirs(), (loss, gradient))


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_rows_without_a_verdict_have_trls_advantages_and_another_denominator(sample: Any, kind: str) -> None:
    """TRL still counts them, which shrinks the step by the share that was scored; ours divides by what was scored.

    Exact up to the chance that two of a group are scored is ours: see the line "unscored dropped" of `llm-pg prove`.
    """
    settings = {"loss_type": "grpo", "scale_rewards": "none"} if kind == "GRPO" else {"num_iterations": 2}
    sampled, old = sample(kind, function=no_verdict_on_long_ones, **settings)
    scored = int((~sampled.rewards_B.isnan()).sum())
    assert 2 < scored < ROWS
    row = grpo("grpo", "none", 0.0) if kind == "GRPO" else dataclasses.replace(ALGORITHMS["rloo"], returns="total")
    loss, gradient, batch = sampled.ours(row, old, reused=kind == "RLOO")
    assert torch.allclose(batch.advantage_BT[:, 0], sampled.inputs["advantages"], rtol=1e-5, atol=1e-5)
    _same(sampled.theirs(), (loss * scored / ROWS, gradient * scored / ROWS))


def test_bnpo_in_two_micro_batches_differs_in_trl_and_not_here(sample: Any) -> None:
    """TRL averages the micro-batches' token means, so its gradient depends on the cut; the whole batch's does not."""
    sampled, old = sample("GRPO", loss_type="bnpo", scale_rewards="none")
    whole, inputs = sampled.ours(grpo("bnpo", "none", 0.0), old, reused=False)[1], sampled.inputs
    order = inputs["completion_mask"].sum(1).argsort()
    sampled.trainer.current_gradient_accumulation_steps = 2
    theirs = torch.zeros_like(whole)
    ours = torch.zeros_like(whole)
    algorithm, model = Algorithm(grpo("bnpo", "none", 0.0)), sampled.trainer.model
    batch = algorithm.compute_advantages(sampled.rollouts(old))
    for half in order.split([2, 6]):
        sampled.inputs = {k: v[half] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
        theirs += sampled.theirs()[1]
        model.zero_grad()
        algorithm.loss(sampled.logp(model), batch.rows(half))[0].backward()
        ours += _gradient(model)
    assert float((ours - whole).norm()) < 1e-5 * float(whole.norm())
    assert float((theirs - whole).norm()) > 1e-2 * float(whole.norm())
