"""On-policy distillation: the teacher's log-probabilities are its own forward's, and a policy learns what it knows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import Algorithm, GRPOConfig, Learner, Policy, PolicyGradientTrainer
from llm_pg.config import ConfigError
from llm_pg.estimators.distributions import token_logp
from llm_pg.metrics import read_metrics
from llm_pg.model.teacher import Teacher
from llm_pg.sampling.protocol import SamplingParams
from tests.model.test_policy import rollouts
from tests.tiny import ONE_STEP, ROWS, Recorder, digits, graded

Make = Callable[..., Any]


def policy_of(model: Any, tokenizer: Any, **changes: Any) -> Policy:
    return Policy(model, params=SamplingParams(**changes), tokenizer=tokenizer)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_teachers_log_probabilities_are_those_of_its_own_forward(
    family: str, make_model: Make, tokenizer: Any
) -> None:
    model, batch = make_model(family, seed=5), rollouts()
    policy = policy_of(make_model("llama"), tokenizer, temperature=0.7, top_k=3)
    logp_BT = Teacher.of_policy(model, policy).logp(batch, 2)
    assert batch.tokens_BT is not None
    for i, prompt in enumerate(batch.prompt_ids_B):
        n = int(batch.length_B[i])
        done = batch.tokens_BT[i, :n]
        logits = model(torch.tensor([[*prompt, *done.tolist()]])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logp_BT[i, :n], token_logp(logits / 0.7, done), atol=2e-5, rtol=1e-5)
        assert (logp_BT[i, n:] == 0).all()


def test_an_update_of_opd_is_the_policy_gradient_of_the_reverse_kl_of_the_sampled_rows(
    make_model: Make, tokenizer: Any
) -> None:
    model, batch = make_model("llama"), rollouts()
    policy = policy_of(model, tokenizer)
    batch.logp_BT = policy.logp(batch, 100)
    teacher = Teacher.of_policy(make_model("llama", seed=5), policy)
    gain_BT = torch.where(batch.mask_BT, teacher.logp(batch, 100) - batch.logp_BT, 0.0)
    to_go_BT = gain_BT.flip(1).cumsum(1).flip(1)
    other_BT = to_go_BT.view(-1, 2, to_go_BT.shape[1]).flip(1).reshape(to_go_BT.shape)  # of the group's other row
    for name, credit_BT in (("opd", to_go_BT - other_BT), ("opd_token", gain_BT)):
        model.zero_grad()
        scores = policy.forward(batch, with_entropy=False)
        (-(credit_BT * scores.logp_BT).sum() / len(batch.mask_BT)).backward()
        expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
        model.zero_grad()
        learner = Learner(
            policy, Algorithm(name), torch.optim.SGD(policy.parameters(), lr=1.0), teacher=teacher, max_grad_norm=0.0
        )
        before = torch.cat([p.detach().clone().flatten() for p in policy.parameters()])
        update = learner.update(_Scored(dataclasses.replace(batch)))
        after = torch.cat([p.detach().flatten() for p in policy.parameters()])
        torch.testing.assert_close(before - after, expected, atol=2e-6, rtol=1e-4)
        kl = -float(gain_BT[batch.mask_BT].mean())
        assert update.metrics["teacher_kl"] == pytest.approx(kl, rel=1e-5)
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(before, policy.parameters())


class _Scored:
    def __init__(self, of: Any) -> None:
        self.rollouts = of


def test_no_reward_is_trained_on_and_none_is_missed(make_model: Make, tokenizer: Any) -> None:
    batch = rollouts()
    batch.teacher_logp_BT = batch.logp_BT - 0.5 * batch.mask_BT
    unscored = dataclasses.replace(batch, valid_B=torch.arange(6) % 2 == 0, reward_BT=torch.zeros_like(batch.reward_BT))
    algorithm = Algorithm("opd")
    scored, missing = (algorithm.compute_advantages(each).advantage_BT for each in (batch, unscored))
    assert torch.equal(scored, missing)
    assert scored.abs().sum() > 0
    with pytest.raises(ValueError, match="nothing would be learned"):
        Algorithm("rloo", reward_coef=0.0)


def test_reward_and_teacher_add_up(make_model: Make, tokenizer: Any) -> None:
    batch = rollouts()
    batch.teacher_logp_BT = batch.logp_BT - torch.rand(batch.logp_BT.shape)
    reward = Algorithm("rloo").compute_advantages(batch).advantage_BT
    taught = Algorithm("opd").compute_advantages(batch).advantage_BT
    both = Algorithm("rloo", reward_coef=2.0, teacher_coef=0.3).compute_advantages(batch).advantage_BT
    torch.testing.assert_close(both, 2.0 * reward + 0.3 * taught)


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    args = GRPOConfig(str(folder), **{**ONE_STEP, "algorithm": "opd", "noise_steps": 0, **changes})
    return {"reward_funcs": graded, "args": args, "train_dataset": ROWS, "terminal": Recorder()}


def saved(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def one(completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def weights(trainer: PolicyGradientTrainer) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}


def test_a_policy_comes_close_to_its_own_trained_self(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    given = arguments(tmp_path, algorithm="rloo", max_steps=20, run_name="teacher", prompts_per_step=8)
    PolicyGradientTrainer(model, processing_class=tokenizer, **given | {"reward_funcs": digits}).train()
    for row in ("opd", "opd_token"):
        given = arguments(tmp_path, algorithm=row, max_steps=24, run_name=row, prompts_per_step=8) | {
            "reward_funcs": digits
        }
        PolicyGradientTrainer(make_model("llama"), processing_class=tokenizer, teacher_model=model, **given).train()
        first, *_, last = read_metrics(tmp_path / row / "metrics.jsonl")
        assert first["teacher_kl"] > 2
        assert abs(last["teacher_kl"]) < 0.1
        assert first["reward"] < 1 < 3 < last["reward"]  # digits of 4 tokens, which nobody rewarded


def test_a_folder_an_object_and_the_config_are_one_teacher_and_a_run_goes_on_bit_exact(
    make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    teacher = make_model("llama", seed=5)
    name = saved(teacher, tokenizer, tmp_path / "teacher")
    ended = {}
    for way, argument, setting in (("config", None, name), ("folder", name, None), ("object", teacher, None)):
        given = arguments(tmp_path, max_steps=4, run_name=way, save_steps=2, teacher_model_name_or_path=setting)
        trainer = PolicyGradientTrainer(
            make_model("llama"), processing_class=tokenizer, teacher_model=argument, **given
        )
        trainer.train()
        ended[way] = weights(trainer)
    for way in ("folder", "object"):
        assert all(torch.equal(x, ended[way][key]) for key, x in ended["config"].items())
    given = arguments(tmp_path, max_steps=4, run_name="config", save_steps=2, teacher_model_name_or_path=name)
    again = PolicyGradientTrainer(make_model("llama"), processing_class=tokenizer, **given)
    again.train(resume=tmp_path / "config" / "checkpoints" / "step-000002")
    assert all(torch.equal(x, ended["config"][key]) for key, x in weights(again).items())
    line = json.loads(next((tmp_path / "folder" / "completions").glob("*")).read_text().splitlines()[0])
    assert len(line["tokens"]["teacher_logp"]) == len(line["tokens"]["logp"])
    page = (tmp_path / "folder" / "report.html").read_text()
    assert "KL to the teacher" in page
    assert '"m":' in page  # of each token


@pytest.mark.parametrize("row", ["opd", "opd_token"])
def test_without_a_reward_function_a_run_learns_from_the_teacher_as_beside_a_constant_one(
    row: str, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    teacher, ended = make_model("llama", seed=5), {}
    for name, rewards in (("alone", None), ("empty", []), ("constant", one)):
        given = arguments(tmp_path, algorithm=row, max_steps=3, run_name=name, num_eval_prompts=0)
        given["reward_funcs"] = rewards
        trainer = PolicyGradientTrainer(make_model("llama"), processing_class=tokenizer, teacher_model=teacher, **given)
        trainer.train()
        ended[name] = weights(trainer)
    first = make_model("llama").state_dict()
    assert not all(torch.equal(x, ended["alone"][key]) for key, x in first.items())
    for name in ("empty", "constant"):
        assert all(torch.equal(x, ended[name][key]) for key, x in ended["alone"].items())
    assert (tmp_path / "alone" / "report.html").stat().st_size > 0


def test_held_out_prompts_are_not_evaluated_where_nothing_says_what_passes(
    make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    given = arguments(tmp_path, max_steps=1, run_name="r", num_eval_prompts=2) | {"reward_funcs": None}
    trainer = PolicyGradientTrainer(
        make_model("llama"), processing_class=tokenizer, teacher_model=make_model("llama", seed=5), **given
    )
    trainer.train()
    assert trainer.eval_prompts == []
    assert trainer.summary.get("pass_rate_after") is None


def test_an_adapter_of_a_model_teaches_as_the_two_together(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    import peft

    base = saved(make_model("llama"), tokenizer, tmp_path / "base")
    tuned = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    torch.manual_seed(0)
    for key, x in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(x, std=0.3)
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.save_pretrained(tmp_path / "adapter")
    policy, batch = policy_of(make_model("llama"), tokenizer), rollouts()
    found = Teacher.from_pretrained(tmp_path / "adapter", policy).logp(batch, 3)
    together = Teacher.of_policy(tuned, policy).logp(batch, 3)
    torch.testing.assert_close(found, together, atol=2e-6, rtol=1e-5)
    assert (found - Teacher.from_pretrained(base, policy).logp(batch, 3)).abs().max() > 0.01


def test_a_teacher_over_other_tokens_is_refused(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    other = type(tokenizer)(
        tokenizer_object=_shifted(tokenizer), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    name = saved(make_model("llama", seed=5), other, tmp_path / "teacher")
    policy = policy_of(make_model("llama"), tokenizer)
    with pytest.raises(ConfigError, match=r"has another tokenizer: \d+ of the policy's \d+ tokens"):
        Teacher.from_pretrained(name, policy)
    small = make_model("llama")
    small.resize_token_embeddings(20)
    with pytest.raises(ConfigError, match="The teacher knows 20 tokens"):
        Teacher.of_policy(small, policy)
    with pytest.raises(ConfigError, match="could not be loaded"):
        Teacher.from_pretrained(tmp_path / "nothing", policy)


def _shifted(tokenizer: Any) -> Any:
    """The tokenizer's core with each character at its neighbour's place."""
    from tokenizers import Tokenizer

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    names = list(core["model"]["vocab"])
    core["model"]["vocab"] = {name: i for i, name in enumerate([*names[:3], *names[4:], names[3]])}
    return Tokenizer.from_str(json.dumps(core))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "grpo", "teacher_model_name_or_path": "somebody/teacher"}, "learns from no teacher"),
        (
            {"algorithm": "opd", "teacher_model_name_or_path": "x/y", "dynamic_sampling_max_rounds": 2},
            "still learns from the teacher",
        ),
        ({"algorithm": "opd", "teacher_model_server_url": "http://a:1", "teacher_model_revision": "v2"}, "names none"),
        ({"algorithm": "grpo", "teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "names none"),
        ({"algorithm": "ppo", "teacher_coef": 0.5}, "not to those of a critic"),
        ({"algorithm": "maxrl", "teacher_coef": 0.5}, "likelihood of success"),
    ],
)
def test_what_cannot_go_with_a_teacher_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(str(tmp_path), **{**ONE_STEP, **settings})


def test_a_run_without_its_teacher_is_refused(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no teacher is named"):
        PolicyGradientTrainer(make_model("llama"), processing_class=tokenizer, **arguments(tmp_path))


def test_a_loop_of_ones_own_is_told_that_the_teacher_is_missing(make_model: Make, tokenizer: Any) -> None:
    policy = policy_of(make_model("llama"), tokenizer)
    with pytest.raises(ValueError, match=r"Teacher\.from_pretrained"):
        Learner(policy, Algorithm("opd"), torch.optim.SGD(policy.parameters(), lr=0.1))
