"""Every optimiser and schedule of transformers that runs here: its own steps, and a resume bit for bit."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from llm_pg import GRPOConfig, GRPOTrainer
from llm_pg.config import ConfigError
from llm_pg.config.train import TrainConfig
from llm_pg.learner.optimizer import make_optimizer
from llm_pg.terminal import Terminal
from llm_pg.words import words_of

OPTIMISERS = [
    ("adamw_torch", None),
    ("adamw_torch_fused", None),
    ("adafactor", None),
    ("adagrad", "lr_decay=0.1"),
    ("rmsprop", "momentum=0.5"),
    ("sgd", None),
    ("sgd", "momentum=0.9,nesterov=true"),
]
REFUSED = ("galore", "apollo", "lomo", "adalomo", "schedule_free", "adamw_torch_xla", "adamw_torch_npu")
SCHEDULES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt")},
    "constant_with_warmup": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
ROWS = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)]


def known(name: str) -> set[str]:
    return set(words_of(TrainConfig.model_fields[name].annotation))


def test_the_words_are_those_of_transformers_but_for_those_that_are_refused() -> None:
    theirs = {each.value for each in OptimizerNames if not each.value.startswith(REFUSED)}
    assert known("optim") == theirs
    assert known("lr_scheduler_type") == {each.value for each in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    assert set(SCHEDULES) == known("lr_scheduler_type")


@pytest.mark.parametrize("optim, optim_args", OPTIMISERS)
def test_a_step_is_that_of_transformers_trainer(
    optim: str, optim_args: str | None, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    given = {"optim": optim, "optim_args": optim_args, "learning_rate": 1e-2, "weight_decay": 0.1}
    theirs, ours = make_model("llama"), make_model("llama")
    peer = Trainer(theirs, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **given))
    optimizers = [peer.create_optimizer(), make_optimizer(TrainConfig(**given), ours.parameters())]
    assert type(optimizers[0]) is type(optimizers[1])
    for step in range(3):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0, msg=name)


def digits(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def weights_after(run: str, model: Any, tokenizer: Any, folder: Path, resume: Any = None, **given: Any) -> Any:
    settings = {"max_steps": 4, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 4}
    more = {"eval_strategy": "no", "use_cpu": True, "reward_in_process": True, "learning_rate": 1e-2, "run_name": run}
    config = GRPOConfig(str(folder), save_steps=2, save_total_limit=None, **{**settings, **more, **given})
    trainer = GRPOTrainer(model, digits, config, ROWS, processing_class=tokenizer, terminal=Terminal(quiet=True))
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "given",
    [
        *[{"optim": optim, "optim_args": optim_args, "weight_decay": 0.1} for optim, optim_args in OPTIMISERS[2:]],
        *[{"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs} for name, kwargs in list(SCHEDULES.items())[-3:]],
    ],
    ids=str,
)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(
    given: dict[str, Any], make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    whole = weights_after("whole", make_model("llama"), tokenizer, tmp_path, **given)
    checkpoint = next((tmp_path / "whole").rglob("*000002"), None) or next((tmp_path / "whole").rglob("checkpoint-2"))
    resumed = weights_after("resumed", make_model("llama"), tokenizer, tmp_path, resume=str(checkpoint), **given)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "given, words",
    [
        pytest.param(
            {"optim": "adamw_8bit"},
            "optim='adamw_8bit' cannot be had: .*bitsandbytes",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"),
        ),
        ({"optim": "galore_adamw"}, "optim"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type='warmup_stable_decay' cannot be had"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
    ],
)
def test_what_cannot_be_made_is_refused_before_a_model_is_loaded(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GRPOTrainer("no/such-model", digits, GRPOConfig("runs", **given), ROWS)


@pytest.mark.parametrize(
    "optim",
    [
        *(
            "adamw_8bit",
            "adamw_bnb_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "lion_8bit",
            "lion_32bit",
            "ademamix",
        ),
        *("ademamix_8bit", "paged_ademamix_8bit", "rmsprop_bnb_8bit", "rmsprop_bnb"),
    ],
)
def test_a_run_with_an_optimiser_of_bitsandbytes_is_resumed_bit_for_bit(
    optim: str, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """All weights share one table of 8-bit numbers, of which a file of tensors holds no two names."""
    pytest.importorskip("bitsandbytes")
    test_a_resumed_run_is_the_whole_run_bit_for_bit(
        {"optim": optim}, lambda name: make_model(name, hidden_size=64, intermediate_size=128), tokenizer, tmp_path
    )
