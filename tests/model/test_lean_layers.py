"""Layers written out compute what the model's own do, with the same gradient of every weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_pg.model import fused, layout, linears, segments
from llm_pg.model.lean_layers import LeanLayers, NotLlamaStyle
from llm_pg.model.linears import Copies
from llm_pg.model.policy import Policy
from tests.model.test_policy import policy_of, rollouts


def moved(model: Any) -> Any:
    """With weights of norms and biases that are not all alike, as after training."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    return model


def logp_and_gradient(policy: Policy, *, is_lean: bool) -> list[torch.Tensor]:
    policy.layout.is_lean = is_lean
    policy.model.zero_grad()
    logp_BT = policy.forward(rollouts()).logp_BT
    (logp_BT * torch.linspace(-1.0, 1.0, logp_BT.numel()).view_as(logp_BT)).sum().backward()
    return [logp_BT.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layers_written_out_are_the_models_own(family: str, make_model: Callable[..., Any]) -> None:
    policy = policy_of(moved(make_model(family)))
    assert policy.layout.is_lean
    ours, theirs = (logp_and_gradient(policy, is_lean=is_lean) for is_lean in (True, False))
    assert len(ours) == len(theirs) == 1 + len(policy.parameters())
    size = torch.stack([b.norm() for b in theirs[1:]]).norm()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=2e-6)
    assert all(float((a - b).norm()) <= 1e-6 * float(size) for a, b in zip(ours[1:], theirs[1:], strict=True))


OPERATIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "norm of a sum": (
        lambda x, delta, weight: fused.AddNorm.apply(x, delta, weight, 0.1, None),
        [(5, 6), (5, 6), (6,)],
    ),
    "norm": (lambda x, weight: fused.AddNorm.apply(x, None, weight, 0.1, None), [(5, 6), (6,)]),
    "gated unit": (fused.SwiGlu.apply, [(5, 8)]),
    "rotation": (lambda x: fused.Rotated.apply(x, ANGLES.cos(), ANGLES.sin() * SIGNS, 1, 1), [(5, 3, 4)]),
    "product of two layers": (
        lambda x, w, v, b: linears.Product.apply(x, linears.Copy(layers_of(w, v, b), torch.float64), w, v, None, b),
        [(5, 6), (3, 6), (2, 6), (2,)],
    ),
    "attention": (
        lambda q, k, v: segments.WrittenOut.apply(q, k, v, torch.zeros(2, 1, 6, 4, dtype=torch.float64), 0.3, None),
        [(2, 4, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5)],
    ),
}
ANGLES = torch.linspace(0.0, 2.0, 10, dtype=torch.float64).view(5, 1, 2).repeat(1, 1, 2)
SIGNS = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)


def layers_of(weight: torch.Tensor, other: torch.Tensor, bias: torch.Tensor) -> list[torch.nn.Linear]:
    """Two layers of one input, of which the second has a bias."""
    layers = [torch.nn.Linear(6, 3, bias=False), torch.nn.Linear(6, 2)]
    for layer, value in zip(layers, (weight, other), strict=True):
        layer.weight = torch.nn.Parameter(value.detach())
    layers[1].bias = torch.nn.Parameter(bias.detach())
    return layers


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_gradient_of_each_operation_is_its_slope_by_differences(name: str) -> None:
    operation, shapes = OPERATIONS[name]
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(operation, inputs)


def test_attention_in_one_operation_has_the_values_and_the_gradient_of_each_call_alone() -> None:
    runs = segments.Segments([0, 5, 9, 12, 14], [5, 4, 3, 2, 6], [0, 0, 0, 0, 12], [0, 5, 5, 0, 2])
    g = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 20, 4, generator=g, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    together, alone = (way(runs, torch.device("cpu")) for way in (segments.ExactCalls, segments.MaskedCalls))
    ours, theirs = (way(query, key, value, 0.3) for way in (together, alone))
    assert "CallsTogether" in str(ours.grad_fn.next_functions)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *given: together(*given, 0.3), (query, key, value))


def test_an_adapters_layers_are_called_unchanged(make_model: Callable[..., Any]) -> None:
    model = get_peft_model(moved(make_model("llama")), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    policy = policy_of(model)
    assert policy.layout.is_lean
    ours, theirs = (logp_and_gradient(policy, is_lean=is_lean) for is_lean in (True, False))
    size = torch.stack([b.norm() for b in theirs[1:]]).norm()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=2e-6)
    assert all(float((a - b).norm()) <= 1e-6 * float(size) for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_model_of_other_parts_keeps_its_own_layers(family: str, make_model: Callable[..., Any]) -> None:
    model = make_model(family)
    assert not policy_of(model).layout.is_lean
    with pytest.raises(NotLlamaStyle):
        LeanLayers(model, Copies())


@pytest.mark.parametrize("part", ["layers.0", "layers.1.self_attn.q_proj", "layers.0.mlp", "norm"])
def test_who_listens_to_a_part_of_the_model_still_hears_it(part: str, make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    policy, heard = policy_of(model), []
    assert policy.layout.is_lean
    model.model.get_submodule(part).register_forward_hook(lambda *_: heard.append(part))
    policy.forward(rollouts())
    assert heard == [part]


def test_a_trial_refuses_layers_that_look_alike_and_scale_their_outputs(make_model: Callable[..., Any]) -> None:
    granite = make_model("llama", model_type="granite", residual_multiplier=0.5)
    assert not policy_of(granite).layout.is_lean


def test_weights_are_cast_once_for_all_passes_of_a_step_and_again_when_they_have_moved(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, made = make_model("llama"), rollouts(), []
    policy = policy_of(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    original = linears.Copy.__init__

    def counted(self: Any, *args: Any) -> None:
        made.append(args)
        original(self, *args)

    monkeypatch.setattr(linears.Copy, "__init__", counted)
    products = 4 * model.config.num_hidden_layers
    with policy.layout.copies.held():
        first = policy.logp(batch, micro_rows=1)
        assert len(made) == products
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        changed = policy.logp(batch, micro_rows=1)
        assert len(made) == products + 1
        model.model.layers[0].mlp.up_proj.weight.data /= 1.5  # torch does not count this
        policy.layout.copies.forget()
        assert torch.equal(policy.logp(batch, micro_rows=1), first)
    assert not torch.equal(first, changed)


def test_ranks_that_hold_parts_of_the_weights_go_through_the_models_layers(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(make_model("llama"))

    def refused(*_: Any) -> None:
        raise AssertionError("lean layers were made")

    monkeypatch.setattr(layout, "LeanLayers", refused)
    with pytest.raises(AssertionError, match="lean layers were made"):
        policy.forward(rollouts())
    policy.layout.same_passes = True
    policy.forward(rollouts())


def test_layers_in_float32_serve_their_own_backward_pass_in_no_memory_of_the_copy() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(24, width, bias=False) for width in (32, 16, 16)]
    copy = Copies().of(layers, torch.float32)
    x = torch.randn(9, 24, requires_grad=True)
    out = linears.Product.apply(x, copy, *(layer.weight for layer in layers), None, None, None)
    probe = torch.randn_like(out)
    (ours,) = torch.autograd.grad((out * probe).sum(), x)
    (theirs,) = torch.autograd.grad((torch.cat([layer(x) for layer in layers], 1) * probe).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if copy.blocks is not None:
        assert "plain" not in vars(copy)
