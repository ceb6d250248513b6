"""Advantage and loss functions of a user, proven or refused."""

from pathlib import Path

import pytest

from llm_pg import prove

SOURCE = """
import torch

def returns(r):
    return r.reward_BT.sum(1)

def leave_one_out(r):
    R = returns(r)
    same = (r.group_B[:, None] == r.group_B[None]).to(R.dtype)
    return R - (same @ R - R) / (same.sum(1) - 1)

def leave_one_out_in_a_loop(r):
    R = [float(x) for x in returns(r)]
    group = r.group_B.tolist()
    out = []
    for i in range(len(R)):
        others = [R[j] for j in range(len(R)) if j != i and group[j] == group[i]]
        out.append(R[i] - sum(others) / len(others))
    return torch.tensor(out, dtype=torch.float64)

def less_my_neighbour(r):
    return returns(r) - returns(r).roll(1)

def the_last_counts_twice(r):
    row = torch.arange(len(r.group_B))
    last = (row[:, None] < row[None]) & (r.group_B[:, None] == r.group_B[None])
    return leave_one_out(r) * (2.0 - last.any(1).to(r.reward_BT.dtype))

def less_the_mean(r):
    return returns(r) - returns(r).mean()

def to_go_less_value(r):
    return r.reward_BT.flip(1).cumsum(1).flip(1) - r.value_BT

def to_go_less_the_value_after(r):
    return r.reward_BT.flip(1).cumsum(1).flip(1) - r.value_BT.roll(-1, 1)

def z_score_unguarded(r):
    return (returns(r) - returns(r).mean()) / returns(r).std()

def one_number(r):
    return torch.tensor(1.0)

def a_list(r):
    return [1.0, 2.0]

def less_my_length(r):
    return returns(r) - 0.1 * r.mask_BT.sum(1)

def noisy(r):
    return returns(r) + torch.rand(len(r.group_B))

def broken(r):
    return r.no_such_field

not_a_function = 3

def ppo_without_clipping(logp_BT, batch):
    ratio = (logp_BT - batch.proximal_logp_BT).exp()
    return -(ratio * batch.advantage_BT * batch.loss_scale_BT * batch.mask_BT).sum()

def indexed(logp_BT, batch):
    return -(batch.advantage_BT * logp_BT * batch.loss_scale_BT)[batch.mask_BT].sum()

def per_token(logp_BT, batch):
    return -batch.advantage_BT * logp_BT

def detached(logp_BT, batch):
    return (batch.advantage_BT * logp_BT.detach()).sum()

def infinite(logp_BT, batch):
    return logp_BT.sum() / 0.0
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "my_estimators.py"
    path.write_text(SOURCE)
    return str(path)


def verdicts(**functions: str) -> list[str]:
    return [line.kind for line in prove.prove_own(functions.get("advantage"), functions.get("loss"))]


@pytest.mark.parametrize("name", ["leave_one_out", "to_go_less_value"])
def test_right_advantages_are_proven_in_every_world(own: str, name: str) -> None:
    assert verdicts(advantage=f"{own}:{name}") == ["exact"] * 4


def test_a_function_that_needs_python_numbers_is_proven_in_a_loop_over_smaller_groups(own: str) -> None:
    lines = prove.prove_own(f"{own}:leave_one_out_in_a_loop", None)
    assert [line.kind for line in lines] == ["exact"] * 4
    assert {line.num_generations for line in lines} == {2, 3}


def test_a_function_that_reads_the_order_of_rows_is_proven_over_every_order(own: str) -> None:
    """Over sorted groups it would look biased: its neighbour would tell of it."""
    lines = prove.prove_own(f"{own}:less_my_neighbour", None)
    assert [line.kind for line in lines] == ["exact"] * 4
    assert all("any order" in line.section for line in lines)


def test_a_function_that_treats_the_last_row_apart_is_proven_over_every_order(own: str) -> None:
    """The first two may change places; over sorted groups alone its scale depends on which completion sorts last."""
    for line in prove.prove_own(f"{own}:the_last_counts_twice", None):
        assert "any order" in line.section
        assert (line.kind, line.scale) == (
            "right direction",
            pytest.approx((line.num_generations + 1) / line.num_generations),
        )


def test_a_mean_that_contains_itself_keeps_the_direction(own: str) -> None:
    lines = prove.prove_own(f"{own}:less_the_mean", None)
    assert [line.kind for line in lines] == ["right direction"] * 4
    assert lines[0].scale == pytest.approx(0.75, rel=1e-10)


def test_a_value_of_the_state_after_the_action_is_found_biased(own: str) -> None:
    assert verdicts(advantage=f"{own}:to_go_less_the_value_after") == ["biased"] * 4


def test_a_loss_is_proven_on_fresh_and_on_old_data(own: str) -> None:
    assert verdicts(loss=f"{own}:ppo_without_clipping") == ["exact"] * 4 + ["biased"]


@pytest.mark.slow
def test_a_loss_that_indexes_by_the_mask_is_proven_in_a_loop(own: str) -> None:
    lines = prove.prove_own(None, f"{own}:indexed")
    assert [line.kind for line in lines] == ["exact"] * 4 + ["biased"]


def test_an_advantage_and_a_loss_are_proven_together(own: str) -> None:
    found = verdicts(advantage=f"{own}:less_the_mean", loss=f"{own}:ppo_without_clipping")
    assert found == ["right direction"] * 4 + ["biased"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one_number", r"returned shape \(\) for 4 rollouts of 3 steps.*\(4,\).*\(4, 3\)"),
        ("a_list", "returned a list"),
        ("z_score_unguarded", "returned nan at.*small constant"),
        ("less_my_length", "reads the future: with all rewards 0, the weight of step 0 is -0.1 .*<eos> and -0.2"),
        ("noisy", "different numbers for the same rollouts"),
        ("broken", "raised AttributeError.*no_such_field.*Rollouts"),
        ("not_a_function", "not a function"),
        ("missing", "has no 'missing'"),
    ],
)
def test_what_cannot_be_proven_is_refused_in_one_paragraph(
    own: str, name: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(prove.ProofError, match=words):
        prove.prove_own(f"{own}:{name}", None)
    assert prove.main(advantage=f"{own}:{name}") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("llm-pg prove: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("per_token", r"returned shape \(4, 3\); a loss function returns a scalar"),
        ("detached", "no gradient"),
        ("infinite", "returned -inf; steps outside batch.mask_BT"),
    ],
)
def test_a_loss_that_cannot_be_proven_is_refused(own: str, name: str, words: str) -> None:
    with pytest.raises(prove.ProofError, match=words):
        prove.prove_own(None, f"{own}:{name}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [("my.py", "not of the form my.py:fn"), ("nowhere.py:fn", "there is no file 'nowhere.py'")],
)
def test_a_function_that_cannot_be_found_is_refused(spec: str, words: str) -> None:
    with pytest.raises(prove.ProofError, match=words):
        prove.prove_own(spec, None)


def test_a_file_that_cannot_be_imported_is_refused_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken_file.py").write_text("raise RuntimeError('no luck')\n")
    with pytest.raises(prove.ProofError, match="raised RuntimeError: no luck"):
        prove.prove_own(f"{tmp_path / 'broken_file.py'}:fn", None)
