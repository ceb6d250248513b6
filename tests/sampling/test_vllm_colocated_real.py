"""vLLM in the trainer's own process, the real one. It runs in an environment that has vLLM beside this package:

LLM_PG_TEST_VLLM=1 PYTHON -m pytest -m vllm -n 0 tests/sampling/test_vllm_colocated_real.py
"""

import copy
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import load_model
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.vllm import EngineError, VllmSampler, colocated
from llm_pg.sampling.vllm.compare import gap
from llm_pg.sampling.vllm.settings import Settings
from tests.sampling.vllm_cases import EXACT, MODELS, PROMPTS, G, move, rows_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("LLM_PG_TEST_VLLM") != "1", reason="set LLM_PG_TEST_VLLM=1"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not in this environment"),
]
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"enforce-eager": True, "gpu-memory-utilization": 0.2}
PARAMS = SamplingParams(max_completion_length=16)


def model_of(kind: str, tokenizer: Any) -> Any:
    return load_model(ModelConfig(make=MODELS[kind]), tokenizer, seed=0)  # type: ignore[call-arg]


def sampler_of(model: Any, tokenizer: Any, folder: Path, rows_at_once: int | None = None) -> VllmSampler:
    settings = Settings(colocated=True, options=OPTIONS)
    return VllmSampler(model, tokenizer, [1], rows_at_once, settings=settings, folder=folder)


def sample(sampler: VllmSampler, params: SamplingParams = PARAMS, seed: int = 0) -> Any:
    return sampler.sample(PROMPTS, G, params, stream_key(seed, torch.arange(len(PROMPTS) * G)))


def test_an_adapter_is_served_merged_and_an_engine_can_follow_another(tokenizer: Any, tmp_path: Path) -> None:
    """A second engine in the process, after the first has ended, and rows_at_once below a group. Stands before
    the tests whose engine lasts as long as the file."""
    model = model_of("untied", tokenizer)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    threads = torch.set_num_threads
    for turn in range(2):
        variables = set(os.environ)
        with sampler_of(model, tokenizer, tmp_path / str(turn), rows_at_once=2) as sampler:
            assert torch.set_num_threads is threads
            assert {name for name in set(os.environ) - variables if not name.startswith("VLLM_")} == set()
            for _ in range(2):
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        if "lora_" in name:
                            p.add_(0.1 * torch.randn_like(p))
                assert gap(model, rows_of(sample(sampler)), PARAMS) < EXACT
        assert not torch.distributed.is_initialized()


def test_ranks_that_run_together_have_an_engine_each(tmp_path: Path) -> None:
    """Other prompts and lengths on each, and other numbers of batches: no engine waits for the other rank's. The ranks'
    group is there while vLLM runs and after it."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch, torch.distributed as dist\n"
        "from llm_pg.model.loading import character_tokenizer\n"
        "from tests.sampling.test_vllm_colocated_real import model_of, sampler_of\n"
        "from tests.sampling.vllm_cases import PROMPTS, G, move\n"
        "from llm_pg.sampling.protocol import SamplingParams\n"
        "from llm_pg.sampling.random import stream_key\n"
        "dist.init_process_group('gloo')\n"
        "rank, tokenizer = dist.get_rank(), character_tokenizer()\n"
        "model, gaps = model_of('untied', tokenizer), []\n"
        "with sampler_of(model, tokenizer, Path(sys.argv[1]) / str(rank)) as sampler:\n"
        "    for _ in range(3 - rank):\n"
        "        params = SamplingParams(max_completion_length=8 + 4 * rank)\n"
        "        prompts = PROMPTS[: 4 - rank]\n"
        "        sampler.sample(prompts, G, params, stream_key(rank, torch.arange(len(prompts) * G)))\n"
        "        gaps.append(sampler.last_gap)\n"
        "        move(model)\n"
        "    dist.all_reduce(torch.ones(1))\n"
        "seen = torch.tensor([max(gaps), len(gaps)], dtype=torch.float64)\n"
        "every = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]\n"
        "dist.all_gather(every, seen)\n"
        "if rank == 0: Path(sys.argv[1], 'seen').write_text(repr([x.tolist() for x in every]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    (first, _), (second, _) = seen = json.loads((tmp_path / "seen").read_text())
    assert [int(count) for _, count in seen] == [3, 2]
    assert max(first, second) < EXACT


def test_what_vllm_refuses_is_one_paragraph(tokenizer: Any, tmp_path: Path) -> None:
    model = model_of("untied", tokenizer)
    with sampler_of(model, tokenizer, tmp_path) as sampler, pytest.raises(EngineError, match="could not complete") as e:
        sampler.sample([list(range(3, 90)) * 2], 1, PARAMS, torch.tensor([1]))
    assert "\n" not in str(e.value)
    wrong = Settings(colocated=True, options={**OPTIONS, "max-model-len": 10**6})
    with pytest.raises(EngineError, match="could not be started"):
        VllmSampler(model, tokenizer, [1], settings=wrong, folder=tmp_path).__enter__()


@pytest.fixture(scope="module", params=list(MODELS))
def engine(request: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmSampler]:
    folder = tmp_path_factory.mktemp(request.param)
    with sampler_of(model_of(request.param, tokenizer), tokenizer, folder) as sampler:
        yield sampler


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        SamplingParams(max_completion_length=16, temperature=0.7, top_k=12),
        SamplingParams(max_completion_length=16, top_k=30, top_p=0.8),
        SamplingParams(max_completion_length=16, top_k=30, min_p=0.3),
        SamplingParams(max_completion_length=16, greedy=True),
    ],
)
def test_ids_and_log_probabilities_are_those_of_the_trainer(engine: VllmSampler, params: SamplingParams) -> None:
    done = sample(engine, params)
    assert gap(engine.model, rows_of(done), params) < EXACT
    assert torch.equal(done.tokens_BT, sample(engine, params).tokens_BT)
    others = sample(engine, params, seed=1)
    assert params.greedy == torch.equal(done.tokens_BT, others.tokens_BT)


def test_every_sync_is_exact(engine: VllmSampler) -> None:
    sample(engine)
    before = engine.syncs
    gaps = []
    torch.manual_seed(5)
    for _ in range(4):
        old = copy.deepcopy(engine.model)
        move(engine.model)
        rows = rows_of(sample(engine))
        gaps.append(gap(engine.model, rows, PARAMS))
        assert gap(old, rows, PARAMS) > 0.05
    print("mean |Δ log-probability| after each sync:", gaps)
    assert max(gaps) < EXACT
    assert engine.syncs == before + 4


def test_weights_that_change_without_a_sync_are_noticed(engine: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's weights are its own: what the trainer changes in place does not move them, and the check sees it."""
    sample(engine)
    torch.manual_seed(6)
    move(engine.model)
    assert engine.host is not None
    monkeypatch.setattr(engine.host, "load", lambda model, present: None)
    with pytest.raises(EngineError, match=r"vLLM in this process differ from the trainer's by 0\.\d+ nats"):
        sample(engine)
    monkeypatch.undo()
    assert gap(engine.model, rows_of(sample(engine)), PARAMS) < EXACT


def test_a_weight_that_one_sync_left_out_is_named(engine: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    move(engine.model)
    sample(engine)
    stale = "model.layers.1.mlp.down_proj.weight"
    move(engine.model)
    real = colocated.stream
    monkeypatch.setattr(colocated, "stream", lambda model, dtype: ((n, x) for n, x in real(model, dtype) if n != stale))
    with pytest.raises(EngineError, match=f"It still has the old {stale}"):
        sample(engine)
    monkeypatch.undo()
    move(engine.model)
    assert gap(engine.model, rows_of(sample(engine)), PARAMS) < EXACT


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(engine: VllmSampler) -> None:
    row = rows_of(sample(engine, SamplingParams(max_completion_length=24)))[0]
    word = engine.tokenizer.decode(row.ids[4:6])
    done = sample(engine, SamplingParams(max_completion_length=24, stop=(word,)))
    text = engine.tokenizer.decode(rows_of(done)[0].ids)
    assert text.endswith(word)
    assert text.count(word) == 1
    assert not done.truncated_B[0]


def test_the_process_is_left_as_it_was(engine: VllmSampler) -> None:
    """Draws of the trainer, its threads and its environment do not depend on what samples."""

    def state() -> tuple[Any, ...]:
        numbers = numpy.random.get_state()[1].tolist()  # type: ignore[union-attr]
        shown = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
        return torch.get_rng_state().tolist(), random.getstate(), numbers, torch.set_num_threads, shown

    torch.manual_seed(3)
    before = state()
    move_state = torch.get_rng_state()
    move(engine.model)
    torch.set_rng_state(move_state)
    sample(engine)
    assert state() == before
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_the_quickstart_learns_in_one_process_as_with_the_native_engine(tmp_path: Path) -> None:
    summaries: dict[str, Any] = {}
    gaps: list[float] = []
    for engine, more in (("native", []), ("vllm", ["vllm_mode=colocate"])):
        command = [sys.executable, "-m", "llm_pg.cli", "train", str(ROOT / "configs" / "quickstart.yaml")]
        command += [f"rollout.engine={engine}", f"output_dir={tmp_path}", f"run_name={engine}", *more, "--quiet"]
        subprocess.run(command, check=True, cwd=ROOT)
        summaries[engine] = json.loads((tmp_path / engine / "summary.json").read_text())
        lines = [json.loads(line) for line in (tmp_path / engine / "metrics.jsonl").read_text().splitlines()]
        gaps = [line["sampler_gap"] for line in lines]
    for engine, summary in summaries.items():
        keys = ("pass_rate_before", "pass_rate_after", "seconds_total", "seconds_by_phase")
        print(engine, {k: summary[k] for k in keys})
    print("mean |Δ log-probability|: median over steps", sorted(gaps)[len(gaps) // 2], "largest", max(gaps))
    low, high = (summaries["native"]["pass_rate_after_interval"][i] for i in (1, 2))
    assert summaries["native"]["pass_rate_before"] == pytest.approx(summaries["vllm"]["pass_rate_before"], abs=0.02)
    assert summaries["vllm"]["pass_rate_after"] > 0.9
    assert low - 0.05 <= summaries["vllm"]["pass_rate_after"] <= high + 0.05
    assert len(gaps) == 100
    assert max(gaps) < EXACT
