"""Linear layers with LoRA as products of our own, against PEFT's module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llm_pg.model.linears import Copies, parts_of_linear, product


class Three(nn.Module):
    """Layers of one input, as queries, keys and values are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 6), nn.Linear(10, 4, bias=False), nn.Linear(10, 4)


def adapted(targets: list[str], **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Three().double(), LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options))
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter, dtype=torch.float64)
        parameter.requires_grad_("lora" in name)
    return model.eval()


def layers(model: Any) -> list[Any]:
    return [model.base_model.model.a, model.base_model.model.b, model.base_model.model.c]


@pytest.mark.parametrize("targets", [["a", "b", "c"], ["a", "c"], ["b"]])
@pytest.mark.parametrize("switched_off", [False, True])
def test_values_and_gradients_are_those_of_pefts_module(targets: list[str], switched_off: bool) -> None:
    model = adapted(targets, use_rslora=True)
    x = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(7, 14, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(ours: bool) -> list[torch.Tensor]:
        if ours:
            y = product([part for layer in layers(model) if (part := parts_of_linear(layer))], x, Copies())
        else:
            y = torch.cat([layer(x) for layer in layers(model)], 1)
        given = [x] if switched_off else [x, *trained]
        return [y.detach(), *torch.autograd.grad((y * slope).sum(), given)]

    if switched_off:
        with model.disable_adapter():
            ours, theirs = run(True), run(False)
    else:
        ours, theirs = run(True), run(False)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("why", ["dora", "dropout", "two", "merged", "heard"])
def test_what_is_more_than_base_and_two_products_is_left_to_its_module(why: str) -> None:
    model = adapted(["a"], use_dora=why == "dora", lora_dropout=0.5 if why == "dropout" else 0.0)
    layer = layers(model)[0]
    if why == "dropout":
        assert parts_of_linear(layer) is not None  # in evaluation nothing is dropped
        model.train()
    elif why == "two":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["a"]))
        model.base_model.set_adapter(["default", "other"])
    elif why == "merged":
        model.merge_adapter()
    elif why == "heard":
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
    assert parts_of_linear(layer) is None
    assert parts_of_linear(layers(model)[1]) is not None
