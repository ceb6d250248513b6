"""A teacher at a vLLM server against a small server that computes what a transformers model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm_pg import Policy, Teacher
from llm_pg.config import ConfigError
from llm_pg.rollouts import TextRollouts
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.vllm import EngineError
from llm_pg.sampling.vllm.teacher import ServedTeacher
from tests.model.test_policy import rollouts
from tests.sampling.fake_vllm import FakeVllm, instead

pytestmark = pytest.mark.fake


@pytest.fixture
def server(make_model: Callable[..., Any], tokenizer: Any) -> Iterator[FakeVllm]:
    made = FakeVllm(make_model("llama", seed=5), tokenizer)
    yield made
    made.stop()


def with_turns() -> TextRollouts:
    batch = rollouts()
    batch.inserted_B = [((1, (40, 41)),) if n > 1 else () for n in batch.length_B.tolist()]
    return batch


@pytest.mark.parametrize("batch", [rollouts(), with_turns()], ids=["one turn", "turns"])
def test_a_served_teacher_scores_as_the_same_model_in_this_process(
    batch: TextRollouts, server: FakeVllm, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    policy = Policy(make_model("llama"), params=SamplingParams(), tokenizer=tokenizer)
    here = Teacher.of_policy(server.model, policy).logp(batch, 2)
    torch.testing.assert_close(ServedTeacher(server.url).logp(batch, 2), here, atol=2e-6, rtol=1e-5)


def test_a_server_that_is_no_teacher_is_named(server: FakeVllm) -> None:
    with pytest.raises(ConfigError, match="at temperature 1"):
        ServedTeacher(server.url, temperature=0.7)
    with pytest.raises(ConfigError, match="no vLLM server answers there"):
        ServedTeacher("http://127.0.0.1:9")
    teacher = ServedTeacher(server.url)
    server.fault = instead(lambda answer: {"choices": [{"index": 0, "prompt_logprobs": None}]})
    with pytest.raises(EngineError, match="gave no log-probabilities of the prompt"):
        teacher.logp(rollouts(), 2)
    server.fault = instead(lambda answer: {"choices": [{"prompt_logprobs": [None, *[{}] * 100]}]})
    with pytest.raises(EngineError, match="log-probabilit"):
        teacher.logp(rollouts(), 2)
