"""Which weights decay, and which learning rates follow the schedule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llm_pg import GRPOConfig
from llm_pg.config.schema import TrainConfig
from llm_pg.learner.optimizer import make_optimizer, make_scheduler


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_the_weights_that_decay_are_those_of_transformers_trainer(
    family: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(family)
    peer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], weight_decay=0.1))
    theirs = set(peer.get_decay_parameter_names(model))
    optimizer = make_optimizer(TrainConfig(weight_decay=0.1), model.parameters())
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {name_of[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decays) == set(name_of.values())
    assert {name for name, decay in decays.items() if decay == 0.1} == theirs & set(decays)
    assert set(decays.values()) == {0.0, 0.1}


def test_without_decay_there_is_one_group(make_model: Callable[..., Any]) -> None:
    assert len(make_optimizer(TrainConfig(), make_model("llama").parameters()).param_groups) == 1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_critics_rate_is_constant_and_every_other_follows_the_schedule(decay: float) -> None:
    policy = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    config = GRPOConfig(lr_scheduler_type="linear", learning_rate=1e-2, weight_decay=decay)
    optimizer = make_optimizer(config.train, policy, [torch.nn.Parameter(torch.ones(2, 2))], rate=0.5)
    scheduler = make_scheduler(config, optimizer, num_steps=4)
    optimizer.step()
    scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([*[0.75e-2] * (2 if decay else 1), 0.5])
    assert optimizer.param_groups[-1]["weight_decay"] == 0.0
