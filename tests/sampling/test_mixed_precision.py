"""Under bf16 a token is sampled from the distribution that is then trained: products in bfloat16 on both sides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg import shipped
from llm_pg.config import load_config
from llm_pg.model.attention import products_in
from llm_pg.model.loading import end_token_ids
from llm_pg.model.policy import Policy
from llm_pg.rollouts import TextRollouts
from llm_pg.run.engines import make_sampler
from llm_pg.sampling.generate import GenerateSampler
from llm_pg.sampling.lean import LeanDecoder
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingParams
from llm_pg.sampling.random import stream_key
from tests.conftest import FAMILIES

PROMPTS = ["ab=", "a longer prompt, and more: ", "x"]
GROUP = 8
PARAMS = SamplingParams(max_completion_length=24)
HALF = torch.bfloat16


def sampled(make: Callable[..., Any], model: Any, tokenizer: Any, **options: Any) -> Completions:
    keys = stream_key(0, torch.arange(len(PROMPTS)).unsqueeze(1), torch.arange(GROUP)).reshape(-1)
    sampler = make(model, tokenizer, end_token_ids(model, tokenizer), **options)
    return sampler.sample([tokenizer(p)["input_ids"] for p in PROMPTS], GROUP, PARAMS, keys)


def gaps(done: Completions, model: Any, tokenizer: Any) -> torch.Tensor:
    """|log-probability when sampled - when trained| of each token, trained under bf16."""
    rollouts = TextRollouts.of_scored_text(
        mask_BT=done.mask_BT, logp_BT=done.logp_BT, tokens_BT=done.tokens_BT, truncated_B=done.truncated_B,
        group_B=torch.arange(len(PROMPTS)).repeat_interleave(GROUP), reward_B=torch.zeros(len(PROMPTS) * GROUP),
        prompt_ids_B=[tuple(tokenizer(p)["input_ids"]) for p in PROMPTS for _ in range(GROUP)],
    )  # fmt: skip
    policy = Policy(
        model, params=PARAMS, pad_id=tokenizer.pad_token_id, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    return (policy.logp(rollouts, 10**6) - done.logp_BT)[done.mask_BT].abs()


@pytest.fixture
def wide(make_model: Callable[..., Any]) -> Callable[[str], Any]:
    """A model whose logits differ enough for rounding to show."""

    def make(family: str) -> Any:
        model = make_model(family)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(8.0)
        return model

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", [NativeSampler, GenerateSampler])
def test_the_recorded_logp_is_nearer_to_the_trained_one_than_that_of_float32(
    engine: Any, family: str, wide: Callable[[str], Any], tokenizer: Any
) -> None:
    model = wide(family)
    half = gaps(sampled(engine, model, tokenizer, dtype=HALF), model, tokenizer)
    full = gaps(sampled(engine, model, tokenizer), model, tokenizer)
    assert half.mean() < full.mean()
    assert half.max() < 0.2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_blocks_of_bfloat16_give_the_logits_of_the_plain_layers_under_autocast(
    family: str, wide: Callable[[str], Any], tokenizer: Any
) -> None:
    """Three ways to one distribution; what is drawn from it may differ where probabilities tie."""
    model = wide(family)
    ways: list[dict[str, Any]] = [{}, {"lean": False}, {"share_prompts": False}]
    for way in ways:
        assert gaps(sampled(NativeSampler, model, tokenizer, dtype=HALF, **way), model, tokenizer).mean() < 0.03


WAYS: list[dict[str, Any]] = [{}, {"lean": False}, {"share_prompts": False}, {"static": True}]


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_not_rounded_to_half_precision_in_sampler_trainer_or_evaluation(
    way: dict[str, Any], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """A body whose layers add nothing computes the same in both types, so all that is left of bfloat16 is the output
    layer: its inputs are rounded, its result is not. With a rounded one log-probabilities were 0.035 nats off."""
    model = make_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(64.0)
    done = sampled(NativeSampler, model, tokenizer, dtype=HALF, **way)
    weight = model.lm_head.weight.to(HALF).double()
    for row, (tokens, mask) in enumerate(zip(done.tokens_BT, done.mask_BT, strict=True)):
        prompt, sampled_N = tokenizer(PROMPTS[row // GROUP])["input_ids"], tokens[mask]
        with torch.no_grad():
            hidden = model.model(torch.tensor([[*prompt, *sampled_N.tolist()]])).last_hidden_state[0]
        logp = (hidden[len(prompt) - 1 : -1].to(HALF).double() @ weight.T).log_softmax(-1)
        expected = logp.gather(1, sampled_N.unsqueeze(1)).squeeze(1).float()
        torch.testing.assert_close(done.logp_BT[row][mask], expected, atol=2e-4, rtol=1e-4)
    assert gaps(done, model, tokenizer).max() < 2e-4


def test_the_lean_layers_take_their_type_from_autocast_and_leave_the_weights_alone(
    wide: Callable[[str], Any], tokenizer: Any
) -> None:
    model = wide("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert LeanDecoder(model).dtype is None
    with torch.no_grad(), products_in(HALF, model):
        lean = LeanDecoder(model)
    assert lean.dtype is HALF
    assert {lean.head.dtype, lean.layers[0].qkv.dtype, lean.layers[1].down.dtype} == {HALF}
    sampled(NativeSampler, model, tokenizer, dtype=HALF)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, before[name], atol=0, rtol=0)


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize(("switch", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, None)])
def test_a_run_samples_in_the_type_it_trains_in(
    engine: str, switch: str | None, dtype: torch.dtype | None, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    config = load_config(
        shipped.find("quickstart.yaml"), [f"rollout.engine={engine}", *([f"{switch}=true"] if switch else [])]
    )
    sampler = make_sampler(config, make_model("llama"), tokenizer)
    assert isinstance(sampler, NativeSampler | GenerateSampler)
    assert sampler.dtype is dtype
