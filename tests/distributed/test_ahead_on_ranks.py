"""Sampling ahead of training on several ranks: one age on all of them, nothing lost, one end for all."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_pg.config import ConfigError
from llm_pg.config.load import check_values
from llm_pg.config.schema import ModelConfig
from llm_pg.distributed.launch import check_ahead
from llm_pg.distributed.strategy import Strategy
from llm_pg.metrics import Clock, read_metrics
from llm_pg.model.loading import character_tokenizer, load_model
from llm_pg.rollout.ahead import resharding
from llm_pg.rollout.ahead.serialization import pack
from llm_pg.run.guard import RunStopped
from tests.distributed.sameness import NUMBERS, forget_the_last
from tests.faults.conftest import lines, weights
from tests.faults.tiny_run import LIGHT, SIZES, make
from tests.sampling.fake_vllm import FakeVllm

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CHANGES = {"engine": "native", "reward_in_process": True, "log_completions": 4, "max_staleness": 1}


def drawn(folder: Path, step: int) -> list[tuple[int, list[int]]]:
    """Prompt and ids of the rows that the first rank wrote down."""
    text = (folder / "completions" / f"step-{step:06d}.jsonl").read_text()
    told = [json.loads(line) for line in text.splitlines()]
    return [(row["prompt_index"], row["ids"]) for row in told]


def close(one: Path, other: Path, steps: int) -> None:
    """Ages, completions of the first rank, and what every number of an update is made of."""
    told = lines(one), lines(other)
    assert [len(x) for x in told] == [steps, steps]
    for a, b in zip(*told, strict=True):
        assert (a["staleness"], a["tokens"]) == (b["staleness"], b["tokens"])
        for name in (*NUMBERS, "sampler_gap", "correction_bounded", "reward_std", "completion_length"):
            assert a[name] == pytest.approx(b[name], abs=1e-6), name
        rows = drawn(one, a["step"]), drawn(other, a["step"])
        assert all(x == y for x, y in zip(*rows, strict=False))  # one process writes twice as many
        assert max(map(len, rows)) <= 2 * min(map(len, rows))


def test_two_ranks_that_sample_ahead_train_as_one_process_does(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """In threads, which are ready at once; with processes of their own below."""
    changes = {**CHANGES, "max_steps": 3, "num_eval_prompts": 0}
    make({"out": str(tmp_path), "name": "one", "changes": changes, "inside": True}).train()
    both = ranks("two", changes=changes, inside=True)
    assert both.status == 0, both.output
    assert [line["staleness"] for line in lines(tmp_path / "two")] == [0, 1, 1]
    close(tmp_path / "one", tmp_path / "two", 3)


@pytest.mark.slow
def test_two_ranks_whose_processes_sample_ahead_train_as_one_process_does(
    ranks: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {**CHANGES, "max_steps": 5, "max_staleness": 3, "dynamic_sampling_max_rounds": 2, "num_generations": 2}
    for run, count in (("one", 1), ("two", 2)):
        ended = ranks(run, changes=changes, count=count)
        assert ended.status == 0, ended.output
    assert [line["staleness"] for line in lines(tmp_path / "two")] == [0, 1, 2, 3, 3]
    close(tmp_path / "one", tmp_path / "two", 5)


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, FSDP], ids=["whole weights", "shards"])
def test_ranks_killed_with_batches_in_flight_end_as_those_that_were_not(
    env: dict[str, str], ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """SIGKILL after step 5; the checkpoint of step 3 holds what both ranks had sampled for steps 4 and 5."""
    changes = {**CHANGES, "max_staleness": 2, "save_steps": 3, "num_iterations": 2, "surrogate": "clip", "beta": 0.05}
    whole = ranks("whole", changes=changes, env=env)
    assert whole.status == 0, whole.output
    assert ranks("cut", changes=changes, env=env, fault="kill", at=5).status == -9
    again = ranks("cut", changes=changes, env=env, resume=True)
    assert again.status == 0, again.output
    assert [line["staleness"] for line in lines(tmp_path / "cut")] == [0, 1, 2, 2, 2, 2]
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


@pytest.mark.slow
def test_shards_that_sample_ahead_train_as_whole_weights_do(ranks: Callable[..., Any], tmp_path: Path) -> None:
    for lora in (False, True):
        changes = {**CHANGES, "max_steps": 4, "adam_epsilon": 1e-3, "max_staleness": 2}
        for run, env in ((f"whole {lora}", {}), (f"shards {lora}", FSDP)):
            ended = ranks(run, changes=changes, env=env, lora=lora)
            assert ended.status == 0, ended.output
        close(tmp_path / f"whole {lora}", tmp_path / f"shards {lora}", 4)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_with_what_was_in_flight(
    counts: tuple[int, int], ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Groups are dealt out anew: the ages and numbers are those of the run that kept its ranks."""
    changes = {**CHANGES, "max_steps": 4, "save_steps": 2, "max_staleness": 2}
    before, after = counts
    for run in ("kept", "changed"):
        ended = ranks(run, changes=changes, count=before)
        assert ended.status == 0, ended.output
    forget_the_last(tmp_path / "changed")
    ended = ranks("changed", changes=changes, count=after, resume=True)
    assert ended.status == 0, ended.output
    assert [line["staleness"] for line in lines(tmp_path / "changed")] == [0, 1, 2, 2]
    close(tmp_path / "kept", tmp_path / "changed", 4)


@pytest.mark.slow
def test_the_death_of_one_ranks_sampler_ends_all_with_its_cause_and_is_survived(
    ranks: Callable[..., Any], tmp_path: Path
) -> None:
    ended = ranks("r", changes=CHANGES, fault="kill the second rank's sampler", at=2)
    assert ended.status
    cause = "The process that samples ahead ended: killed by SIGKILL. Its log"
    assert f"Rank 1 ended the run: EngineError: {cause}" in ended.output
    assert (tmp_path / "r" / "ahead-rank1.log").exists()
    again = ranks("r", changes=CHANGES, resume=True)
    assert again.status == 0, again.output
    assert [line["step"] for line in lines(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_reward_that_fails_in_the_background_of_one_rank_ends_both(ranks: Callable[..., Any]) -> None:
    changes = {**CHANGES, "reward_in_process": False, "max_steps": 2}
    ended = ranks("r", changes=changes, reward=f"{LIGHT}:on_rank_1", env={"FAULT": "raises"})
    assert ended.status
    assert "Rank 1 ended the run: RewardError: Reward function on_rank_1 could not score" in ended.output
    assert "injected on rank 1" in ended.output


def test_ranks_with_completions_of_different_ages_do_not_train_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make({"out": str(tmp_path), "name": "r", "changes": {**CHANGES, "max_steps": 2}, "inside": True})
    gather = run.context.ranks.gather

    def other_is_behind(value: Any) -> list[Any]:
        return [1, 0] if isinstance(value, int) and run.run.step == 2 else gather(value)

    monkeypatch.setattr(run.context.ranks, "gather", other_is_behind)
    with pytest.raises(RunStopped, match=r"At step 2 the ranks hold completions of different ages \(1, 0 updates"):
        run.train()
    assert [line["step"] for line in read_metrics(run.folder.metrics)] == [1]


def test_a_checkpoint_holds_the_batches_that_every_rank_has(tmp_path: Path) -> None:
    """The second rank's third batch failed; each takes its own part back, whole groups, in order."""
    run = make({"out": str(tmp_path), "name": "r", "changes": {**CHANGES, "max_staleness": 0}})
    prompts, by_index = run.prompts.take(0), {prompt.index: prompt for prompt in run.train_prompts}

    def told(rank: int, batches: list[int]) -> resharding.RankBatches:
        entries, tensors = [], {}
        for batch in batches:
            half = prompts[2 * rank : 2 * rank + 2]
            with run.scorer:
                experience = run.collector.collect(half, batch, 4, Clock(), 2 * rank)
            numbers, own = pack(experience)
            entries.append({"batch": batch, "version": 1, "seconds": {"sample": 1.0 + rank}, "experience": numbers})
            tensors.update({f"{batch}.{name}": x for name, x in own.items()})
        return entries, tensors

    entries, tensors = resharding.of_all([told(0, [2, 3]), told(1, [2])])
    ((batch, version, parts),) = resharding.by_batch(entries, tensors)
    assert (batch, version, len(parts)) == (2, 1, 2)
    with run.scorer:
        whole = run.collector.collect(prompts, 2, 4, Clock())
    texts = []
    for number in (0, 1):
        experience, seconds = resharding.of_rank(parts, number, 2, by_index, None, "cpu")  # type: ignore[misc]
        texts += experience.texts
        assert seconds == {"sample": 1.0 + number}
    assert texts == whole.texts
    one, seconds = resharding.of_rank(parts, 0, 1, by_index, None, "cpu")  # type: ignore[misc]
    assert (one.texts, one.scores.reward, seconds) == (whole.texts, whole.scores.reward, {"sample": 2.0})
    assert [prompt.index for prompt in one.prompts] == [prompt.index for prompt in prompts]
    four = [resharding.of_rank(parts, number, 4, by_index, None, "cpu")[0] for number in range(4)]  # type: ignore[index]
    assert [text for each in four for text in each.texts] == whole.texts


def test_servers_that_would_be_brought_older_weights_from_shards_are_refused_by_name() -> None:
    config = check_values({"engine": "vllm", "vllm_urls": ["http://host:1"], "max_staleness": 1})
    check_ahead(config, Strategy("cpu"))
    cut = Strategy("cpu")
    cut.shards_weights, cut.num_ranks = True, 2
    check_ahead(check_values({"engine": "native", "max_staleness": 1}), cut)
    with pytest.raises(ConfigError, match=r"max_staleness is 1, the engine is vllm, and the weights are.*ddp\.yaml"):
        check_ahead(config, cut)


@pytest.mark.fake
@pytest.mark.slow
def test_servers_of_each_rank_follow_its_older_weights(ranks: Callable[..., Any], tmp_path: Path) -> None:
    """A stand-in for vLLM at each rank, which the engine checks at every batch against the weights it asked for."""
    tokenizer = character_tokenizer()
    model = load_model(ModelConfig(make=SIZES), tokenizer, seed=0)  # type: ignore[call-arg]
    servers = [FakeVllm(copy.deepcopy(model), tokenizer) for _ in range(2)]
    changes = {**CHANGES, "engine": "vllm", "vllm_urls": [server.url for server in servers], "max_steps": 4}
    ended = ranks("r", changes=changes)
    for server in servers:
        server.stop()
    assert ended.status == 0, ended.output
    assert all(server.count("/collective_rpc") >= 3 for server in servers)
    told = lines(tmp_path / "r")
    assert [line["staleness"] for line in told] == [0, 1, 1, 1]
    assert told[1]["sampler_gap"] > 1e-3 > told[0]["sampler_gap"]
