"""Which weights decay, and which learning rates follow the schedule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from llm_pg import GRPOConfig
from llm_pg.config import ConfigError
from llm_pg.config.train import TrainConfig
from llm_pg.learner.optimizer import check_optimizer, make_optimizer, make_scheduler


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


def test_without_decay_there_is_one_group_and_it_has_none(make_model: Callable[..., Any]) -> None:
    """AdamW of torch decays by 0.01 where nobody says otherwise."""
    (group,) = make_optimizer(TrainConfig(), make_model("llama").parameters()).param_groups
    assert group["weight_decay"] == 0.0


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


def groups(train: TrainConfig, *shapes: tuple[int, ...], critic: int = 0) -> list[dict[str, Any]]:
    policy = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    valued = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(critic)]
    found = make_optimizer(train, policy, valued, rate=0.5).param_groups
    names = {id(p): f"p{i}" for i, p in enumerate(policy)} | {id(p): f"v{i}" for i, p in enumerate(valued)}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in found]


def test_the_numbers_of_the_config_are_those_of_the_optimiser() -> None:
    given = {"learning_rate": 0.25, "adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 0.125, "weight_decay": 0.1}
    for group in groups(TrainConfig(**given), (2, 2), (2,)):
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 0.125)


def test_matrices_decay_vectors_and_scalars_do_not_and_nor_does_the_critic() -> None:
    found = groups(TrainConfig(weight_decay=0.1, learning_rate=0.25), (2, 2), (2,), (1, 2, 2), (), critic=2)
    assert [(group["params"], group["weight_decay"], group["lr"]) for group in found] == [
        (["p0", "p2"], 0.1, 0.25),
        (["p1", "p3"], 0.0, 0.25),
        (["v0", "v1"], 0.0, 0.5),
    ]
    assert ["constant" in group for group in found] == [False, False, True]
    assert found[2]["constant"] is True


def test_a_critic_has_no_rate_unless_one_is_given_and_a_group_without_weights_is_left_out() -> None:
    only_matrices = groups(TrainConfig(weight_decay=0.1), (2, 2))
    assert [group["params"] for group in only_matrices] == [["p0"]]
    critic = torch.nn.Parameter(torch.ones(2))
    made = make_optimizer(TrainConfig(), [torch.nn.Parameter(torch.ones(2, 2))], [critic])
    assert made.param_groups[-1]["lr"] == 0.0
    assert len(make_optimizer(TrainConfig(), [critic]).param_groups) == 1


def test_parameters_may_be_given_once_and_lazily(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    made = make_optimizer(TrainConfig(weight_decay=0.1), (p for p in model.parameters()))
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_weights_of_sixteen_bits_are_counted_and_named(dtype: torch.dtype, name: str) -> None:
    whole, half = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=dtype))
    for number, policy, critic in (
        (2, [whole, half], [half]),
        (2, [half, half, whole], []),
        (1, [whole, whole], [half]),
    ):
        with pytest.raises(ValueError) as error:
            make_optimizer(TrainConfig(), policy, critic)
        number = sum(p is half for p in (*policy, *critic))
        assert str(error.value) == (
            f"{number} of 3 trained tensors are {name}: steps of a small learning rate would round to nothing there. "
            "Hold them in float32 and compute in 16 bits by autocast (training.precision.hold_trained_in_float32; a "
            "trainer does so by itself)."
        )


def test_an_argument_that_the_optimiser_cannot_take_is_named_in_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        make_optimizer(TrainConfig(optim="sgd", optim_args="momentum=much"), [torch.nn.Parameter(torch.ones(2, 2))])
    assert str(error.value).startswith("optim='sgd' cannot be had: ")
    assert "much" in str(error.value)
    assert "\n" not in str(error.value)
    assert "  " not in str(error.value)


@pytest.mark.parametrize(
    "optim, optim_args, unread",
    [
        ("sgd", "momentun=0.9", "momentun"),
        ("sgd", "momentum=0.9, betas=0.9, eps=1", "betas, eps"),
        ("adamw_torch", "eps=1e-4", "eps"),
        ("adafactor", "scale_parameter=true", "scale_parameter"),
    ],
)
def test_an_argument_that_transformers_would_leave_out_is_refused(optim: str, optim_args: str, unread: str) -> None:
    """There a run goes on without it, and nobody says so."""
    with pytest.raises(ConfigError) as error:
        make_optimizer(TrainConfig(optim=optim, optim_args=optim_args), [torch.nn.Parameter(torch.ones(2, 2))])
    assert str(error.value) == (
        f"optim={optim!r} cannot be had: it reads no {unread} from optim_args ({optim_args!r}); leave it out."
    )


@pytest.mark.parametrize(
    "optim, optim_args, name, value",
    [
        ("sgd", "momentum=0.5,nesterov=true", "momentum", 0.5),
        ("sgd", "momentum=0.0", "momentum", 0.0),
        ("adagrad", "lr_decay = 0.1", "lr_decay", 0.1),
        ("rmsprop", "centered=true", "centered", True),
    ],
)
def test_arguments_of_its_own_reach_an_optimiser(optim: str, optim_args: str, name: str, value: Any) -> None:
    assert groups(TrainConfig(optim=optim, optim_args=optim_args), (2, 2))[0][name] == value


def test_the_schedule_warms_up_by_the_steps_of_the_config_and_ends_with_the_run() -> None:
    config = GRPOConfig(lr_scheduler_type="linear", learning_rate=1.0, warmup_steps=2)
    optimizer = make_optimizer(config.train, [torch.nn.Parameter(torch.ones(2, 2))])
    scheduler = make_scheduler(config, optimizer, num_steps=6)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_a_schedules_own_arguments_reach_it() -> None:
    config = GRPOConfig(
        lr_scheduler_type="cosine_with_min_lr", learning_rate=1.0, lr_scheduler_kwargs={"min_lr_rate": 0.25}
    )
    optimizer = make_optimizer(config.train, [torch.nn.Parameter(torch.ones(2, 2))])
    scheduler = make_scheduler(config, optimizer, num_steps=2)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_a_critic_has_its_rate_from_the_first_step_while_the_policy_warms_up() -> None:
    config = GRPOConfig(lr_scheduler_type="linear", learning_rate=1.0, warmup_steps=4)
    optimizer = make_optimizer(
        config.train, [torch.nn.Parameter(torch.ones(2, 2))], [torch.nn.Parameter(torch.ones(2, 2))], rate=0.5
    )
    scheduler = make_scheduler(config, optimizer, num_steps=8)
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == [[0.0, 0.5], [0.25, 0.5], [0.5, 0.5]]


def test_a_schedule_that_cannot_be_made_is_named_with_its_arguments() -> None:
    config = GRPOConfig(lr_scheduler_type="cosine_with_min_lr")
    optimizer = make_optimizer(config.train, [torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ConfigError) as error:
        make_scheduler(config, optimizer, num_steps=2)
    said = "lr_scheduler_type='cosine_with_min_lr' cannot be had with lr_scheduler_kwargs={}: "
    with pytest.raises(ValueError) as theirs:
        transformers.get_scheduler("cosine_with_min_lr", optimizer, num_warmup_steps=0, num_training_steps=2)
    assert str(error.value) == said + " ".join(str(theirs.value).split())


@pytest.mark.parametrize("changes, refused", [({}, None), ({"optim_args": "momentum=much", "optim": "sgd"}, "optim=")])
def test_what_is_checked_before_a_model_is_loaded_is_optimiser_and_schedule(
    changes: dict[str, Any], refused: str | None
) -> None:
    config = GRPOConfig(max_steps=1, **changes)
    if refused is None:
        check_optimizer(config)
        return
    with pytest.raises(ConfigError, match=refused):
        check_optimizer(config)


def test_a_schedule_is_checked_over_two_steps_at_least_as_one_step_is_no_schedule_for_some() -> None:
    """A run of one step under a schedule that divides by the steps after the first."""
    check_optimizer(GRPOConfig(max_steps=1, lr_scheduler_type="polynomial", learning_rate=1e-3))
    with pytest.raises(ConfigError, match="lr_scheduler_type"):
        check_optimizer(GRPOConfig(lr_scheduler_type="cosine_with_min_lr"))
