"""The plan's numbers against closed forms, and what it says where nothing fits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from llm_pg import cli
from llm_pg.config import ConfigError
from llm_pg.config.train import TrainConfig
from llm_pg.learner.optimizer import make_optimizer
from llm_pg.model.shape import shape_of_model
from llm_pg.plan import (
    ENGINES,
    MACHINES,
    MODELS,
    MOMENT_BYTES,
    Machine,
    Model,
    PlannedJob,
    choose,
    largest_batches,
    memory,
    phases,
    tokens,
    with_adapter,
)
from llm_pg.words import words_of

H100, SEVEN = MACHINES["h100"], MODELS["7b"]


def named(model: Model, machine: Machine, job: PlannedJob, gpus: int, engine: str) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in phases(model, machine, job, gpus, engine)}


def test_an_update_of_one_device_is_six_flops_a_weight_and_token_at_the_rate_that_is_used() -> None:
    job = PlannedJob(prompts=2, generations=3, prompt_length=5, completion_length=7, checkpointing=False)
    assert tokens(job) == 2 * (5 + 3 * 7)
    machine = Machine(flops=1e3, used=0.5, bandwidth=1e30, memory=1e30, link=1e30, wire=1e30)
    assert named(Model(100, 1, 1, 1), machine, job, 1, "ddp")["update"] == pytest.approx(6 * 100 * 52 / 500)


def test_an_all_reduce_sends_twice_the_weights_less_one_share_over_the_slower_wire_between_machines() -> None:
    inside, across = (
        next(p for p in phases(SEVEN, H100, PlannedJob(), gpus, "ddp") if p.name == "all-reduce") for gpus in (8, 16)
    )
    assert inside.sent == pytest.approx(2 * 7.62e9 * 4 * 7 / 8)
    assert across.sent == pytest.approx(2 * 7.62e9 * 4 * 15 / 16)
    assert inside.seconds == pytest.approx(inside.sent / 450e9 + 29 * 2e-5)
    assert across.seconds == pytest.approx(across.sent / 50e9 + 29 * 2e-5)


def test_shards_divide_what_is_at_rest_and_only_that() -> None:
    """16 bytes a weight in float32: weights, gradients and two moments."""
    whole, cut = (memory(SEVEN, PlannedJob(), 8, engine) for engine in ("ddp", "fsdp2"))
    assert whole["at rest"] == pytest.approx(16 * 7.62e9)
    assert cut["at rest"] == pytest.approx(16 * 7.62e9 / 8)
    assert cut["training"] == whole["training"]
    assert cut["sampling"] == pytest.approx(whole["sampling"] + 4 * 7.62e9)


def test_an_adapter_of_2_percent_needs_its_own_16_bytes_a_weight_beside_the_frozen_ones_and_no_reference() -> None:
    job = PlannedJob(trained=0.02, weight_bytes=2, reference=True)
    assert memory(SEVEN, job, 1, "ddp")["at rest"] == pytest.approx(7.62e9 * (2 + 0.02 * 16))
    of = {phase.name: phase for phase in phases(SEVEN, H100, job, 2, "ddp")}
    assert of["all-reduce"].sent == pytest.approx(2 * 0.02 * 7.62e9 * 2 / 2)


@pytest.mark.parametrize(("optim", "bytes_a_weight"), [("adamw_torch", 16), ("adamw_8bit", 10), ("sgd", 8)])
def test_an_optimiser_holds_its_state_beside_weights_and_gradients(optim: str, bytes_a_weight: int) -> None:
    job = PlannedJob(moment_bytes=MOMENT_BYTES[optim])
    assert memory(SEVEN, job, 1, "ddp")["at rest"] == pytest.approx(bytes_a_weight * 7.62e9)


def test_every_optimiser_of_the_settings_has_its_bytes_and_those_that_run_here_hold_them() -> None:
    """Of what a step leaves in its state; a number a block or a row is not counted."""
    assert set(MOMENT_BYTES) == set(words_of(TrainConfig.model_fields["optim"].annotation))
    tried = 0
    for optim, expected in MOMENT_BYTES.items():
        weight = torch.nn.Parameter(torch.randn(128, 128))
        try:
            made = make_optimizer(TrainConfig(optim=optim), [weight])
        except ConfigError:
            continue
        weight.grad = torch.randn_like(weight)
        made.step()
        held = [x for x in made.state[weight].values() if isinstance(x, torch.Tensor) and x.numel() >= weight.numel()]
        assert sum(x.numel() * x.element_size() for x in held) / weight.numel() == expected, optim
        tried += 1
    assert tried >= 6


def test_weights_in_4_bits_are_half_a_byte_but_for_embeddings_and_a_64th_of_scales() -> None:
    """Qwen2.5-7B: 6.53e9 weights in linear layers, 1.09e9 others in 16 bits; an adapter of rank 16 has 40.4e6."""
    job = with_adapter(SEVEN, PlannedJob(), 16, four_bits=True)
    assert job.trained * SEVEN.parameters == pytest.approx(40.4e6, rel=1e-3)
    expected = 6.53e9 * (0.5 + 1 / 64) + 1.09e9 * 2 + 40.4e6 * 16
    assert memory(SEVEN, job, 1, "ddp")["at rest"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("gigabytes", [24, 80])
def test_the_largest_batches_fit_and_one_more_does_not(gigabytes: int, four_bits: bool) -> None:
    """A card has 95 % of its memory less 1 GB; logits and one whole layer come on top of what `memory` counts."""
    job = with_adapter(SEVEN, PlannedJob(), 16, four_bits=four_bits)
    trained, sampled = largest_batches(SEVEN, job, gigabytes * 1e9)
    free = gigabytes * 0.95e9 - 1e9

    def training(rows: int) -> float:
        parts = memory(SEVEN, replace(job, rows=rows), 1, "ddp")
        return parts["at rest"] + parts["training"] * (1 + 32 / 2 / 28) + 3 * 4 * 2**24

    def sampling(groups: int) -> float:
        parts = memory(SEVEN, job, 1, "ddp")
        return parts["at rest"] + groups * parts["sampling"]

    assert training(trained) <= free < training(trained + 1)
    assert sampling(sampled // 8) <= free < sampling(sampled // 8 + 1)
    assert largest_batches(SEVEN, PlannedJob(), gigabytes * 1e9) == (0, 0)


def test_one_card_is_planned_with_what_was_assumed_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "7b", "--gpus", "1", "--device", "rtx4090", "--prompts", "8"]
    assert cli.main(["plan", *words, "--lora-r", "16", "--load-in-4bit"]) == 0
    out = capsys.readouterr().out
    trained, sampled = largest_batches(SEVEN, with_adapter(SEVEN, PlannedJob(), 16, four_bits=True), 24e9)
    assert f"A batch that fits: {trained} completions in a pass" in out
    assert out.startswith("Assumed: 86% of the weights in 4 bits")
    row = next(line.split() for line in out.splitlines() if line.startswith("24 GB"))
    assert row[2:3] + row[-3:] == ["-", str(trained), "|", str(sampled)]


def test_a_model_s_folder_is_planned_by_its_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2.5-0.5B's, whose embeddings are tied: no weight of it is here."""
    Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    shape = shape_of_model(str(tmp_path))
    known = MODELS["0.5b"]
    assert (shape.layers, shape.hidden, shape.kv) == (known.layers, known.hidden, known.kv)
    assert shape.parameters == pytest.approx(known.parameters, rel=1e-3)
    job = ["--gpus", "1", "--device", "rtx4090", "--prompts", "8", "--rows", "2", "--optim", "adamw_8bit"]
    assert cli.main(["plan", "--model", str(tmp_path), *job]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "0.494e9 parameters, 24 layers" in first
    assert cli.main(["plan", "--model", "0.5b", *job]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == rest[-3:]


def test_the_simplest_engine_that_holds_the_model_is_chosen() -> None:
    assert choose(MODELS["0.5b"], H100, PlannedJob(), 1) == "ddp"
    assert choose(SEVEN, H100, PlannedJob(), 8) == "fsdp2"
    with pytest.raises(ConfigError, match="No engine of this project holds it on 64 devices of 80 GB"):
        choose(MODELS["70b"], H100, PlannedJob(), 64)


def test_more_devices_shorten_arithmetic_and_leave_the_weights_that_each_token_reads() -> None:
    """Decoding of few rows is bound by the weights' bytes, which every device reads whole."""
    small = replace(H100, overhead=0.0, memory=1e12)
    job = PlannedJob(prompts=8, generations=1)
    one, eight = (named(SEVEN, small, job, gpus, "ddp") for gpus in (1, 8))
    assert one["update"] / eight["update"] == pytest.approx(8, rel=0.01)
    assert one["decode"] / eight["decode"] < 1.2


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_a_plan_that_names_its_bottleneck(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "7b", "--gpus", "16", "--engine", engine]) == 0
    out = capsys.readouterr().out
    assert f"s with {engine} on 16; bottleneck: " in out
    assert ("It does not fit." in out) == engine.startswith("ddp")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "0"], "numbers above 0; gpus is not"),
        (["--trained", "2"], "at most 1; 2 is not"),
        (["--load-in-4bit"], "give the rank of the adapter too"),
        (["--lora-r", "8", "--load-in-4bit", "--engine", "fsdp2"], "fsdp2 has none"),
        (["--lora-r", "8", "--trained", "0.1"], "leave --trained out"),
        (["--prompts", "10", "--gpus", "4"], "10 prompts cannot be dealt out to 4"),
        (["--gpus", "1", "--engine", "ddp+vllm"], "to 0 training devices"),
        (["--model", "no/such/folder"], "No model was found at 'no/such/folder'"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
