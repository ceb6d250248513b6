"""What the samplers return is what the model says: ids, masks and log-probabilities as really sampled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_pg.estimators.distributions import token_logp
from llm_pg.model.loading import end_token_ids
from llm_pg.sampling.generate import GenerateSampler
from llm_pg.sampling.native import NativeSampler
from llm_pg.sampling.protocol import Completions, SamplingParams
from llm_pg.sampling.random import draw, stream_key, uniform
from tests.conftest import FAMILIES

PROMPTS = ["ab=", "a longer prompt, and more: ", "x"]
ENGINES = [NativeSampler, GenerateSampler]


def keys(num_prompts: int, group: int, seed: int = 0) -> torch.Tensor:
    return stream_key(seed, torch.arange(num_prompts).unsqueeze(1), torch.arange(group)).reshape(-1)


def run(engine: Any, model: Any, tokenizer: Any, params: SamplingParams, group: int = 3, **options: Any) -> Completions:
    sampler = engine(model, tokenizer, end_token_ids(model, tokenizer), **options)
    ids = [tokenizer(p)["input_ids"] for p in PROMPTS]
    return sampler.sample(ids, group, params, keys(len(PROMPTS), group))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.02)])
def test_recorded_logp_is_that_of_one_unpadded_row_alone(
    engine: Any, family: str, params: SamplingParams, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """Left padding, the cache and compaction leave no trace (for gpt2: position ids are right)."""
    model = make_model(family)
    params = SamplingParams(**{**vars(params), "max_completion_length": 12})
    out = run(engine, model, tokenizer, params)
    for i in range(len(out.tokens_BT)):
        prompt = tokenizer(PROMPTS[i // 3])["input_ids"]
        done = out.tokens_BT[i][out.mask_BT[i]]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + done.tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = token_logp(params.warp(logits, keep=done), done)
        torch.testing.assert_close(out.logp_BT[i][out.mask_BT[i]], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_end_token_is_inside_the_mask_and_nothing_after_it(
    engine: Any, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model("llama")
    with torch.no_grad():  # make the end token likely, so that rows end at different lengths
        model.lm_head.weight[tokenizer.eos_token_id] += 3.0
    out = run(engine, model, tokenizer, SamplingParams(max_completion_length=20), group=8)
    ended = ~out.truncated_B
    assert ended.any()
    assert len(set(out.mask_BT.sum(1).tolist())) > 1
    for row, mask, has_ended in zip(out.tokens_BT, out.mask_BT, ended, strict=True):
        inside = row[mask].tolist()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert (inside[-1] == tokenizer.eos_token_id) == bool(has_ended)
        assert tokenizer.eos_token_id not in inside[:-1]
        assert (row[~mask] == tokenizer.pad_token_id).all()


def test_pad_equal_to_eos_does_not_mask_the_end_token(make_model: Callable[..., Any]) -> None:
    from llm_pg.model.loading import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] += 3.0
    out = run(NativeSampler, model, tokenizer, SamplingParams(max_completion_length=20), group=8)
    ended = ~out.truncated_B
    last = out.tokens_BT[torch.arange(len(out.tokens_BT)), out.mask_BT.sum(1) - 1]
    assert ended.any()
    assert (last[ended] == tokenizer.eos_token_id).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_completion_does_not_depend_on_the_batch_it_was_sampled_in(
    family: str, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model, params = make_model(family), SamplingParams(max_completion_length=12)
    together = run(NativeSampler, model, tokenizer, params, group=4)
    in_pieces = run(NativeSampler, model, tokenizer, params, group=4, rows_at_once=4)
    assert torch.equal(together.tokens_BT, in_pieces.tokens_BT)
    torch.testing.assert_close(together.logp_BT, in_pieces.logp_BT, atol=1e-5, rtol=1e-5)


def test_greedy_rows_are_the_argmax_of_the_model(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model = make_model("qwen2")
    ours = run(NativeSampler, model, tokenizer, SamplingParams(greedy=True, max_completion_length=10), group=1)
    peer = run(GenerateSampler, model, tokenizer, SamplingParams(greedy=True, max_completion_length=10), group=1)
    assert torch.equal(ours.tokens_BT, peer.tokens_BT)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_string_ends_a_row_and_its_last_token_is_trained(
    engine: Any, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model("llama")
    stop = tokenizer("z")["input_ids"][0]
    with torch.no_grad():
        model.lm_head.weight[stop] += 2.0
    out = run(engine, model, tokenizer, SamplingParams(max_completion_length=30, stop=("z",)), group=4)
    assert (~out.truncated_B).any()
    for row, mask, truncated in zip(out.tokens_BT, out.mask_BT, out.truncated_B, strict=True):
        text = tokenizer.decode(row[mask])
        assert text.count("z") == (0 if truncated else text.endswith("z")) or tokenizer.eos_token in text


@pytest.mark.parametrize("stop", [(), ("z",)], ids=["end token", "stop string"])
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (NativeSampler, {}),
        (NativeSampler, {"share_prompts": False}),
        (NativeSampler, {"static": True}),
        (GenerateSampler, {}),
    ],
    ids=["shared", "cached", "static", "generate"],
)
def test_what_ends_with_the_last_token_that_fits_is_not_truncated(
    engine: Any, options: dict[str, Any], stop: tuple[str, ...], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """The same rows with room for exactly the longest that ended, and with room for one token less."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[tokenizer("z")["input_ids"][0] if stop else tokenizer.eos_token_id] += 0.5

    def sampled(limit: int) -> Completions:
        params = SamplingParams(max_completion_length=limit, stop=stop)
        return run(engine, model, tokenizer, params, group=8, **options)

    free = sampled(30)
    length_B = free.mask_BT.sum(1)
    longest = int(length_B[~free.truncated_B].max())
    assert longest > 2
    for limit in (longest, longest - 1):
        out = sampled(limit)
        assert torch.equal(out.tokens_BT[:, :limit], free.tokens_BT[:, :limit])
        assert torch.equal(out.truncated_B, free.truncated_B | (length_B > limit))
    assert bool((length_B == longest).any())


def test_dropout_is_off_while_sampling_and_the_mode_comes_back(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model = make_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    first = run(NativeSampler, model, tokenizer, SamplingParams(max_completion_length=8))
    again = run(NativeSampler, model, tokenizer, SamplingParams(max_completion_length=8))
    assert torch.equal(first.tokens_BT, again.tokens_BT)
    assert model.training


def test_draw_follows_the_softmax_and_never_leaves_the_support() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0, -2.0, -torch.inf])
    n = 200_000
    drawn = draw(logits.expand(n, 5), uniform(stream_key(7, torch.arange(n)), 0))
    share = torch.bincount(drawn, minlength=5) / n
    expected = logits.softmax(-1)
    assert share[1] == share[4] == 0
    # four standard errors of a share
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt() + 1e-12).all()


def test_uniforms_are_even_and_uncorrelated_between_neighbouring_streams_and_positions() -> None:
    n = 100_000
    key = stream_key(3, torch.arange(n))
    u, v, w = uniform(key, 0), uniform(key, 1), uniform(stream_key(4, torch.arange(n)), 0)
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
    bins = torch.bincount((u * 64).long(), minlength=64).double()
    chi = ((bins - n / 64) ** 2 / (n / 64)).sum()
    assert chi < 63 + 5 * (2 * 63) ** 0.5
    for other in (v, w, uniform(key + 1, 0)):
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 5 / n**0.5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_shared_prompts_sample_what_the_librarys_cache_samples(
    family: str, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """Over rows that leave, groups that end, and more tokens than were allocated at first."""
    model, params = make_model(family), SamplingParams(max_completion_length=90)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 1.5
    shared = run(NativeSampler, model, tokenizer, params, group=5)
    cached = run(NativeSampler, model, tokenizer, params, group=5, share_prompts=False)
    assert (shared.mask_BT.sum(1) == 90).any()
    assert len(set(shared.mask_BT.sum(1).tolist())) > 2
    assert torch.equal(shared.tokens_BT, cached.tokens_BT)
    torch.testing.assert_close(shared.logp_BT, cached.logp_BT, atol=2e-5, rtol=1e-5)


def test_the_same_prompt_twice_is_kept_once_and_its_rows_differ(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model, params = make_model("llama"), SamplingParams(max_completion_length=10)
    ids = [tokenizer("same ")["input_ids"]] * 2
    outs = [
        NativeSampler(model, tokenizer, [tokenizer.eos_token_id], share_prompts=s).sample(ids, 3, params, keys(2, 3))
        for s in (True, False)
    ]
    assert torch.equal(outs[0].tokens_BT, outs[1].tokens_BT)
    assert len({tuple(row) for row in outs[0].tokens_BT.tolist()}) == 6


LEAN_FAMILIES = {"llama": True, "qwen2": True, "qwen3": True, "gpt2": False}


@pytest.mark.parametrize(("family", "is_lean"), LEAN_FAMILIES.items())
def test_the_lean_decoder_samples_what_the_models_own_layers_sample(
    family: str, is_lean: bool, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """Qwen2 has biases in some of the joined layers, Qwen3 norms on its heads; GPT-2 has other layers."""
    model, params = make_model(family), SamplingParams(max_completion_length=40)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert NativeSampler(model, tokenizer, [tokenizer.eos_token_id]).is_lean is is_lean
    lean = run(NativeSampler, model, tokenizer, params, group=4)
    plain = run(NativeSampler, model, tokenizer, params, group=4, lean=False)
    assert torch.equal(lean.tokens_BT, plain.tokens_BT)
    torch.testing.assert_close(lean.logp_BT, plain.logp_BT, atol=2e-5, rtol=1e-5)


def test_the_lean_decoder_follows_the_weights_and_the_adapter(make_model: Callable[..., Any], tokenizer: Any) -> None:
    """Its own layout of the weights is made anew for every call; an adapter's layers are called as they stand."""
    from peft import LoraConfig, get_peft_model

    plain = make_model("qwen2")
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    sampler = NativeSampler(model, tokenizer, [tokenizer.eos_token_id])
    assert sampler.is_lean
    ids, params = [tokenizer("a prompt ")["input_ids"]], SamplingParams(max_completion_length=20)
    for changed in ("lora_B", "o_proj.weight"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if changed in name:
                    parameter += 0.2
        lean = sampler.sample(ids, 4, params, keys(1, 4))
        library = NativeSampler(model, tokenizer, [tokenizer.eos_token_id], share_prompts=False)
        torch.testing.assert_close(
            lean.logp_BT, library.sample(ids, 4, params, keys(1, 4)).logp_BT, atol=2e-5, rtol=1e-5
        )


def test_a_model_that_only_looks_like_llama_is_not_decoded_leanly(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """The trial compares logits: here the residual of every layer is halved in the model's own forward."""
    model = make_model("llama")
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda module, args, out: out * 0.5)
    assert not NativeSampler(model, tokenizer, [tokenizer.eos_token_id]).is_lean


def test_generate_samples_the_distribution_asked_for_whatever_the_model_prefers(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """Settings that a model brings (Qwen2.5 has a repetition penalty) would make another distribution of it."""
    params, model = SamplingParams(max_completion_length=20), make_model("llama")
    plain = run(GenerateSampler, model, tokenizer, params)
    own = model.generation_config
    own.repetition_penalty, own.suppress_tokens, own.no_repeat_ngram_size = 50.0, list(range(3, 60)), 2
    again = run(GenerateSampler, model, tokenizer, params)
    assert torch.equal(plain.tokens_BT, again.tokens_BT)
    assert torch.equal(plain.logp_BT, again.logp_BT)
    assert model.generation_config is own


def test_generate_takes_at_most_the_rows_it_is_told_at_once(make_model: Callable[..., Any], tokenizer: Any) -> None:
    model, rows = make_model("llama"), []  # type: Any, list[int]
    generate = model.generate

    def counted(**given: Any) -> Any:
        rows.append(len(given["input_ids"]))
        return generate(**given)

    model.generate = counted
    params = SamplingParams(max_completion_length=6)
    out = run(GenerateSampler, model, tokenizer, params, group=3, rows_at_once=4)
    assert rows == [4, 4, 1]
    assert len(out.tokens_BT) == 9
    for i in range(9):
        done = out.tokens_BT[i][out.mask_BT[i]]
        prompt = tokenizer(PROMPTS[i // 3])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + done.tolist()])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(out.logp_BT[i][out.mask_BT[i]], token_logp(logits, done), atol=2e-5, rtol=1e-5)
