"""Ranks that begin with other weights or prompts are found before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg.config import ConfigError
from llm_pg.distributed.strategy import Strategy
from llm_pg.prompts import Prompt
from llm_pg.run.ranks import Ranks
from llm_pg.run.start import check_same_start, weight_digests
from tests.conftest import FAMILIES


class Three(Strategy):
    """Of one of three ranks."""

    num_ranks = 3


def of_three(others: list[Any]) -> Ranks:
    """Ranks whose messages come in order; each is None where the rank says what this one says."""
    ranks, told = Ranks(Three("cpu")), iter(others)
    ranks.gather = lambda value: [value, *(value if x is None else x(value) for x in next(told))]  # type: ignore
    return ranks


PROMPTS = [Prompt(index, str(index), None, (index,), {}) for index in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_single_bit_and_any_two_values_that_changed_places_are_seen(
    family: str, make_model: Callable[..., Any]
) -> None:
    """Equal seeds give equal digests; a weight one bit apart, and a vector turned around, do not."""
    model, twin = make_model(family), make_model(family)
    before = weight_digests(model)
    assert before == weight_digests(twin)
    name, weight = next((n, p) for n, p in twin.named_parameters() if p.dim() == 2)
    with torch.no_grad():
        weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0))
    after = weight_digests(twin)
    assert [n for n in before if before[n] != after[n]] == [name]
    short_name, short = next((n, p) for n, p in model.named_parameters() if p.dim() == 1 and p.numel() <= 64)
    with torch.no_grad():
        short.copy_(torch.arange(float(short.numel())))
    forwards = weight_digests(model)[short_name]
    with torch.no_grad():
        short.copy_(short.flip(0).clone())
    assert weight_digests(model)[short_name] != forwards


def test_digests_do_not_depend_on_the_number_of_threads(make_model: Callable[..., Any]) -> None:
    model, threads = make_model(), torch.get_num_threads()
    try:
        digests = []
        for count in (1, 3):
            torch.set_num_threads(count)
            digests.append(weight_digests(model))
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1]


def test_the_rank_that_differs_is_named_with_its_first_weight(make_model: Callable[..., Any]) -> None:
    model = make_model()
    changed = {"model.norm.weight": "other"}
    ranks = of_three([(None, lambda _: "other"), (None, lambda own: {**own, **changed})])
    with pytest.raises(
        ConfigError, match=r"rank 2 \(1 of \d+ tensors differ, model\.norm\.weight first\)\. .*one seed"
    ):
        check_same_start(model, PROMPTS, ranks)


def test_other_prompts_are_named_too(make_model: Callable[..., Any]) -> None:
    ranks = of_three([(None, None), (lambda _: "other", None), (lambda _: {"": "other"}, None)])
    with pytest.raises(ConfigError, match=r"same training prompts: .* rank 1 \(1 of 1 sets differ\)\..*one dataset"):
        check_same_start(make_model(), PROMPTS, ranks)
    check_same_start(make_model(), PROMPTS, of_three([(None, None), (None, None)]))


@pytest.mark.slow
def test_two_real_ranks_with_other_weights_do_not_train(ranks: Callable[..., Any], tmp_path: Path) -> None:
    ended = ranks("r", fault="another weight on the second rank", at=0)
    assert ended.status
    assert ended.output.count("tensors differ, model.layers.0.mlp.up_proj.weight first)") == 2
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
