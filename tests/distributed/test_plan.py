"""The plan's numbers against closed forms, and what it says where nothing fits."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen2Config

from llm_pg import cli
from llm_pg.config import ConfigError
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
    memory,
    phases,
    tokens,
)

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
