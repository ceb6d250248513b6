"""Environments of our own against their tables, and the rule of time that every way of stepping follows."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from llm_pg.control import tabular
from llm_pg.control.environments import Listed, Vectorised, full_name, inspect, make_rows
from llm_pg.control.mdp import bandit, draw_grid, gridworld

OURS = list(tabular.ENVIRONMENTS)


@pytest.fixture(autouse=True)
def _registered() -> None:
    tabular.register()


@pytest.mark.parametrize("name", OURS)
def test_every_row_of_a_transition_table_is_a_distribution(name: str) -> None:
    mdp = tabular.build(name)
    assert np.allclose(mdp.transition_SAS.sum(2), 1)
    assert (mdp.transition_SAS >= 0).all()
    assert mdp.start_S.sum() == 1
    assert not mdp.start_S[mdp.terminal_S].any()
    assert (mdp.reward_SA[mdp.terminal_S] == 0).all()


def test_a_slippery_grid_moves_as_it_was_told_in_the_rest_of_the_cases() -> None:
    mdp = gridworld(slip=0.2)
    # From the middle of the grid, each of four neighbours gets 0.05 by chance and the chosen one 0.8 more.
    assert mdp.transition_SAS[5, 1, 6] == pytest.approx(0.85)
    assert mdp.transition_SAS[5, 1, 1] == pytest.approx(0.05)


def test_the_shortest_way_is_the_optimal_return() -> None:
    # Six moves at -0.1 each, and 1 at the goal.
    assert tabular.optimal_return(gridworld()) == pytest.approx(0.4)
    # The coin is entered by moves 2, 4, ..., 50, and milking it beats the goal.
    assert tabular.optimal_return(gridworld(coin_reward=0.5)) == pytest.approx(25 * 0.5 - 50 * 0.1)


@pytest.mark.parametrize("name", [name for name in OURS if not tabular.build(name).noise])
def test_the_vectorised_form_gives_what_the_single_one_gives(name: str) -> None:
    """The same actions lead to the same states, rewards and ends, row by row: nothing in these is left to chance."""
    rng = np.random.default_rng(1)
    rows = make_rows(name, 3)
    assert isinstance(rows, Vectorised)
    singles = [gymnasium.make(name) for _ in range(3)]
    state_B = rows.reset(0)
    assert (state_B == [env.reset(seed=0)[0] for env in singles]).all()
    over_B = np.zeros(3, dtype=bool)
    for _ in range(120):
        action_B = rng.integers(singles[0].action_space.n, size=3)
        state_B, reward_B, terminated_B, truncated_B, true_B = rows.step(action_B, ~over_B)
        for row, env in enumerate(singles):
            if over_B[row]:
                assert state_B[row] == env.reset()[0]
                assert reward_B[row] == 0
                continue
            state, reward, terminated, truncated, info = env.step(action_B[row])
            got = (state_B[row], reward_B[row], terminated_B[row])
            assert got == (state, pytest.approx(reward), terminated)
            assert truncated_B[row] == (truncated and not terminated)
            assert "true_reward" not in info or true_B[row] == pytest.approx(info["true_reward"])
        over_B = terminated_B | truncated_B


def test_the_arms_of_the_bandit_pay_their_means() -> None:
    name = "llm_pg/KArmedBandit-v0"
    rows, mdp = make_rows(name, 4_000), tabular.build(name)
    rows.reset(0)
    for arm in (0, 3):
        reward_B = rows.step(np.full(4_000, arm), np.ones(4_000, dtype=bool))[1]
        assert reward_B.mean() == pytest.approx(mdp.reward_SA[0, arm], abs=4 / np.sqrt(4_000))
        rows.reset(None)


def test_a_listed_row_shows_its_last_observation_and_starts_anew_at_the_next_step() -> None:
    rows = Listed("CartPole-v1", 2, 1, {})
    single = gymnasium.make("CartPole-v1")
    first = rows.reset(7)
    seeds = np.random.default_rng(7).integers(2**31, size=2)
    assert (first[0] == single.reset(seed=int(seeds[0]))[0]).all()
    everyone = np.ones(2, dtype=bool)
    ended = np.zeros(2, dtype=bool)
    while not ended[0]:
        observation_B, _, terminated_B, truncated_B, _ = rows.step(np.zeros(2, dtype=int), everyone)
        expected, _, terminated, _, _ = single.step(0)
        assert (observation_B[0] == expected).all()
        ended = terminated_B | truncated_B
    assert terminated
    assert abs(observation_B[0, 2]) > 0.2
    observation_B, reward_B, terminated_B, _, _ = rows.step(np.zeros(2, dtype=int), everyone)
    assert abs(observation_B[0, 2]) <= 0.05
    assert reward_B[0] == 0
    assert not terminated_B[0]


def test_rows_outside_the_active_ones_stand_still() -> None:
    rows = Listed("CartPole-v1", 2, 1, {})
    before = rows.reset(0)
    after = rows.step(np.zeros(2, dtype=int), np.array([True, False]))[0]
    assert (after[1] == before[1]).all()
    assert (after[0] != before[0]).any()


@pytest.mark.parametrize("name", ["CartPole-v1", "llm_pg/GridWorld-v0"])
def test_a_group_starts_from_one_state(name: str) -> None:
    rows = make_rows(name, 6, group_size=3)
    first = rows.reset(0).reshape(2, 3, -1)
    assert (first == first[:, :1]).all()
    if name == "CartPole-v1":
        assert (first[0, 0] != first[1, 0]).any()
        again = rows.reset(None).reshape(2, 3, -1)
        assert (again[0, 0] != first[0, 0]).any()


def test_a_time_limit_is_told_apart_from_an_end() -> None:
    rows = make_rows("llm_pg/GridWorld-v0", 2, options={"horizon": 9})
    assert inspect("llm_pg/GridWorld-v0").horizon == 50
    rows.reset(0)
    for step in range(50):
        # Row 0 pushes against the wall for ever, row 1 goes right and down.
        _, _, terminated_B, truncated_B, _ = rows.step(np.array([0, 1 if step < 3 else 2]), np.ones(2, dtype=bool))
        if step == 5:
            assert terminated_B.tolist() == [False, True]
            assert not truncated_B.any()
    assert truncated_B[0]
    assert not terminated_B[0]


@pytest.mark.parametrize(
    "word, near", [("cartpol", "cartpole"), ("CartPole-v7", "CartPole-v1"), ("gridwrld", "gridworld")]
)
def test_an_unknown_environment_gets_the_nearest_name(word: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"Did you mean.*{near}"):
        full_name(word)


class _Odd(gymnasium.Env):
    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Discrete(3)})


class _Many(gymnasium.Env):
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize("made, words", [(_Odd, "observation space Dict"), (_Many, "action space MultiDiscrete")])
def test_an_unsupported_space_is_named(made: type, words: str) -> None:
    gymnasium.register(id=f"Test{made.__name__}-v0", entry_point=made)
    try:
        with pytest.raises(ValueError, match=words):
            inspect(f"Test{made.__name__}-v0")
    finally:
        gymnasium.registry.pop(f"Test{made.__name__}-v0")


def test_a_missing_package_gets_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **kwargs: object) -> None:
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed")

    monkeypatch.setattr(gymnasium, "make", absent)
    with pytest.raises(ValueError, match=r'pip install "gymnasium\[box2d\]"'):
        inspect("LunarLander-v3")


def test_the_grid_is_drawn_with_its_marks_and_the_walker() -> None:
    assert draw_grid(gridworld(coin_reward=1.0), 5).splitlines()[0] == "S · $ ·"
    assert draw_grid(gridworld(), 5).splitlines()[1] == "· @ · ·"
    assert draw_grid(gridworld(), action_S=np.ones(16, dtype=int)).splitlines()[3] == "→ → → G"


def test_exact_gradient_of_the_sigmoid_bandit_is_its_closed_form() -> None:
    logits_SA = torch.tensor([[0.3, 0.0], [0.0, 0.0]], dtype=torch.float64)
    value, gradient_SA = tabular.exact_gradient(bandit([1.0, 0.0]), logits_SA)
    p = torch.sigmoid(torch.tensor(0.3, dtype=torch.float64))
    assert value == pytest.approx(float(p))
    assert gradient_SA[0].tolist() == pytest.approx([float(p * (1 - p)), -float(p * (1 - p))])
