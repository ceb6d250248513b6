"""An algorithm of the user's: by name, by path, proven, refused where it cannot stand."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from algorithm_batches import make

from llm_pg import register_algorithm
from llm_pg.algorithms.algorithm import Algorithm
from llm_pg.algorithms.registry import find_spec, load_spec
from llm_pg.algorithms.spec import AlgorithmSpec
from llm_pg.algorithms.table import ALGORITHMS
from llm_pg.config import ConfigError, load_config
from llm_pg.estimators.baselines import leave_one_out
from llm_pg.prove import prove_own
from llm_pg.rollouts import Rollouts

SOURCE = """
import torch
from llm_pg import register_algorithm
from llm_pg.algorithms.spec import AlgorithmSpec

def plain(rollouts):
    return rollouts.reward_BT.sum(1)

@register_algorithm(name="of_the_others", source="a test", surrogate="reinforce", loss_type="dapo")
def others(rollouts):
    returns_B = rollouts.reward_BT.sum(1)
    same = (rollouts.group_B[:, None] == rollouts.group_B[None]).to(returns_B.dtype)
    return returns_B - (same @ returns_B - returns_B) / (same.sum(1) - 1)

a_row = AlgorithmSpec("a_row", "a test", baseline="batch_mean")
number = 3

def one(rollouts):
    return torch.ones(1)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    before = dict(ALGORITHMS)
    yield
    for name in set(ALGORITHMS) - set(before):
        del ALGORITHMS[name]


def own_leave_one_out(rollouts: Rollouts) -> torch.Tensor:
    return_B = rollouts.reward_BT.sum(1)
    return return_B - leave_one_out(return_B, rollouts.group_B, rollouts.valid_B)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_function_stands_where_the_row_has_its_returns_and_baseline(beta: float) -> None:
    """The rewards that it sees are those less the KL, as the row's own would be."""
    register_algorithm(name="mine", importance_sampling_level="sequence_sum")(own_leave_one_out)
    rollouts, model = make(3, generations=4)
    changes = {"beta": beta, "returns": "total"}
    built_in = Algorithm(dataclasses.replace(ALGORITHMS["rloo"], **changes))
    own = Algorithm(dataclasses.replace(ALGORITHMS["mine"], **changes))
    gradients = [model.gradient(a, a.compute_advantages(rollouts))[0] for a in (built_in, own)]
    assert float(gradients[0].norm()) > 0
    assert torch.allclose(*gradients, rtol=1e-12)


def test_a_registered_function_is_an_algorithm_of_the_config(file: Path) -> None:
    row = load_spec(f"{file}:others")
    assert (row.name, row.surrogate, row.loss_type) == ("of_the_others", "reinforce", "dapo")
    assert ALGORITHMS["of_the_others"] is row
    from llm_pg.config.check import resolve_spec
    from llm_pg.run.saving.folder import run_name

    model = "model.make={model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    given = [model, "data.task=sort_letters", f"algorithm={file}:others", "beta=0.1"]
    config = load_config(None, given)
    assert resolve_spec(config) == dataclasses.replace(row, beta=0.1)
    assert run_name(config) == "sort_letters-others-seed0"


def test_a_registered_function_has_its_own_name_and_no_source_unless_they_are_given() -> None:
    register_algorithm()(own_leave_one_out)
    made = ALGORITHMS["own_leave_one_out"]
    assert made == AlgorithmSpec("own_leave_one_out", "", advantage=own_leave_one_out)


def test_a_row_of_ones_own_that_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"^Algorithm 'mine': epsilon cannot be -1"):
        AlgorithmSpec("mine", "me", epsilon=-1)
    with pytest.raises(ValueError, match=r"^Algorithm 'grpo': beta cannot be -0\.5"):
        find_spec("grpo", {"beta": -0.5})


def test_a_baseline_for_each_step_is_one_of_a_group() -> None:
    for baseline in ("group_mean", "leave_one_out"):
        assert AlgorithmSpec("mine", "me", baseline=baseline, baseline_per_step=True).baseline_per_step
    message = (
        "Algorithm 'mine': baseline_per_step compares the steps of a group, and the baseline is batch_mean. Use "
        "baseline leave_one_out or group_mean, or leave baseline_per_step out."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AlgorithmSpec("mine", "me", baseline="batch_mean", baseline_per_step=True)


@pytest.mark.parametrize(
    "correction", [{"vllm_importance_sampling_correction": True}, {"off_policy_mask_threshold": 0.1}]
)
def test_a_loss_of_ones_own_with_a_correction_for_the_sampler_says_what_to_do(correction: dict[str, object]) -> None:
    message = (
        "Algorithm 'mine' has a loss of its own, whose tokens cannot be corrected for the sampler one by one. Set "
        "vllm_importance_sampling_correction=false and off_policy_mask_threshold=null (with max_staleness the loss "
        "must correct by itself: batch.rollouts.logp_BT holds the log-probabilities of the sampler)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AlgorithmSpec("mine", "me", loss=lambda logp_BT, batch: logp_BT.sum(), **correction)


@pytest.mark.parametrize("idle", ["baseline=value", "baseline=group_mean", "scale_rewards=group", "pass_k=2"])
def test_what_a_function_would_leave_without_effect_is_refused(idle: str, file: Path) -> None:
    """With baseline=value it was the function that had none: the critic's advantages were trained on."""
    given = ["data.task=sort_letters", f"algorithm={file}:plain", idle]
    with pytest.raises(ConfigError, match=idle.replace("=", " ")):
        load_config(None, given)
    load_config(None, [*given[:-1], "baseline=greedy", "normalize_advantages=rollouts"])


def test_a_plain_function_and_a_row_are_taken_by_path(file: Path) -> None:
    rollouts, _ = make(3)
    batch = Algorithm(load_spec(f"{file}:plain")).compute_advantages(rollouts)
    expected = rollouts.reward_BT.sum(1, keepdim=True).expand_as(batch.advantage_BT) * rollouts.mask_BT
    assert torch.equal(batch.advantage_BT, expected)
    assert load_spec(f"{file}:a_row").baseline == "batch_mean"


def test_what_is_registered_is_what_is_proven(file: Path) -> None:
    """The decorator gives the function back as it was."""
    assert [line.kind for line in prove_own(f"{file}:others", None)] == ["exact"] * 4


def test_a_function_of_the_wrong_shape_is_named_with_what_it_returned(file: Path) -> None:
    rollouts, _ = make(3)
    with pytest.raises(ValueError, match=r"algorithm one returned shape \(1,\) for 6 rollouts of 6 steps.*\(6, 6\)"):
        Algorithm(load_spec(f"{file}:one")).compute_advantages(rollouts)


def test_a_name_of_the_table_is_not_replaced_and_ones_own_is() -> None:
    with pytest.raises(ValueError, match=r"an algorithm 'rloo' already .Ahmadian"):
        register_algorithm(AlgorithmSpec("rloo", "me"))
    for source in ("first", "second"):
        register_algorithm(AlgorithmSpec("mine_twice", source))
    assert ALGORITHMS["mine_twice"].source == "second"
    with pytest.raises(ValueError, match=r"register_algorithm got epsilom; a row has .*epsilon"):
        register_algorithm(epsilom=0.1)(own_leave_one_out)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("{file}:number", "holds a int there"),
        ("{file}:missing", "has no such name"),
        ("no_such_module_at_all:fn", "ModuleNotFoundError"),
        (":fn", "not of the form"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(file: Path, address: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_spec(address.format(file=file))


def test_a_function_is_found_in_a_folder_with_a_colon_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "2026-11:30" / "mine.py"
    file.parent.mkdir()
    file.write_text(SOURCE)
    assert load_spec(f"{file}:a_row").name == "a_row"
    assert find_spec("grpo", {"surrogate": f"{file}:one"}).loss.__name__ == "one"


@pytest.mark.parametrize(
    "algorithm, changes, words",
    [
        ("gropo", {}, r"^algorithm\.name cannot be 'gropo'.*'grpo'"),
        ("grpo", {"bta": 0.1}, r"^a field of an algorithm cannot be 'bta'.*'beta'"),
        ("no_such_module:f", {}, r"^algorithm\.name 'no_such_module:f': loading no_such_module raised"),
        (
            "grpo",
            {"surrogate": "no_such_module:f"},
            r"^algorithm\.surrogate 'no_such_module:f': loading no_such_module",
        ),
        ("grpo", {"surrogate": "math:pi"}, r"^algorithm\.surrogate 'math:pi': math has no function 'pi'"),
        ("math:nothing", {}, r"^algorithm\.name 'math:nothing': math has no such name; give"),
        ("math:pi", {}, r"^algorithm\.name 'math:pi': math holds a float there; give"),
    ],
)
def test_what_is_not_found_is_named_with_its_setting(algorithm: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_spec(algorithm, changes)


def test_unknown_fields_of_a_registered_algorithm_are_listed_beside_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"got betta, gama; a row has advantage, baseline, .*vllm"):
        register_algorithm(betta=1, gama=2)(lambda rollouts: None)


def test_an_algorithm_of_ones_own_may_be_registered_again_and_a_shipped_one_not() -> None:
    for baseline in ("batch_mean", "group_mean"):
        register_algorithm(AlgorithmSpec("registered_twice", "a test", baseline=baseline))
        assert ALGORITHMS["registered_twice"].baseline == baseline
    del ALGORITHMS["registered_twice"]
    with pytest.raises(ValueError, match="There is an algorithm 'grpo' already"):
        register_algorithm(AlgorithmSpec("grpo", "a test"))
